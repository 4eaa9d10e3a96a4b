"""The plan of the house: which folder may import which, and what must not occur in some files; read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sptransform
from sptransform.diagnostics.sources import sources

ROOT = Path(sptransform.__file__).parent
FILES = {
    ".".join(("sptransform", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sources(ROOT)
}

# A folder may import folders of its own level, where these do not import it, and of the levels above it in this list.
LEVELS = (
    ("diagnostics",),
    ("sharding",),
    ("rules", "ops"),
    ("graph", "op_rules"),
    ("engine", "losses", "masks", "routing", "scans", "agreement", "parameters"),
    ("capture", "strategies", "passes"),
    ("compiler",),
    ("cost",),
    ("inspection", "frontend", "testing"),
    ("planning",),
    ("page",),
    ("sweep", "integrations"),
    ("cli",),
    ("", "__main__"),  # the package itself, and `python -m` of it
)

# these know no op
ENGINE = ("axes", "inner_axes", "pass_manager", "propagation", "verifier")
MODELS = ("bert", "deepseek", "falcon", "gemma", "gpt", "llama", "mistral", "mixtral", "opt-", "phi", "qwen", "vit")


def folder_of(module: str) -> str:
    return (*module.split("."), "")[1]


def level_of(folder: str) -> int:
    return next(index for index, names in enumerate(LEVELS) if folder in names)


def imports_of(file: Path) -> Iterator[str]:
    """Modules of the library that a file imports, in functions and for type annotations too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "sptransform")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if (node.module or "").split(".")[0] == "sptransform":
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in FILES else node.module for name in names)


IMPORTS = {module: {name for name in imports_of(file) if name != module} for module, file in FILES.items()}


def test_at_the_root_there_are_only_folders() -> None:
    assert sorted(file.name for file in ROOT.glob("*.py")) == ["__init__.py", "__main__.py"]
    assert {folder_of(module) for module in FILES} == {name for names in LEVELS for name in names}


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_imported_upwards(module: str) -> None:
    for imported in IMPORTS[module]:
        own, other = folder_of(module), folder_of(imported)
        assert level_of(other) <= level_of(own), f"{module} imports {imported}, of a later level"


def assert_no_circle(edges: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"imports go round: {' > '.join((*path, name))}"
        if name not in done:
            for imported in edges.get(name, ()):
                visit(imported, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_no_files_import_each_other() -> None:
    assert_no_circle(IMPORTS)


def test_no_folders_import_each_other() -> None:
    edges: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        edges.setdefault(folder_of(module), set()).update(map(folder_of, imported))
    assert_no_circle({folder: others - {folder} for folder, others in edges.items()})


def test_a_circle_is_found() -> None:
    with pytest.raises(AssertionError, match="a > b > c > a"):
        assert_no_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def code_of(file: Path) -> str:
    """The source without docstrings and comments."""
    return ast.unparse(_without_docstrings(ast.parse(file.read_text())))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_names_no_op(name: str) -> None:
    assert "aten" not in code_of(ROOT / "engine" / f"{name}.py")
    assert "torch.ops" not in code_of(ROOT / "engine" / f"{name}.py")


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_model_is_named(module: str) -> None:
    text = code_of(FILES[module]).lower()
    for name in MODELS:
        assert re.search(rf"\b{name}", text) is None, f"{module} names {name}"
    if folder_of(module) not in ("cli", "integrations", "sweep"):
        assert "transformers" not in text


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_printed(module: str) -> None:
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"), f"{module}:{node.lineno} prints"


@pytest.mark.parametrize("module", sorted(FILES))
def test_only_one_file_knows_where_notes_are_kept(module: str) -> None:
    if module != "sptransform.graph.notes":
        assert not re.search(r"""meta(\.get\(|\[)['"]sptransform""", FILES[module].read_text())


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_file_begins_with_what_it_is(module: str) -> None:
    text = FILES[module].read_text()
    if text:
        assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
