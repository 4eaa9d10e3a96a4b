"""The tiers of the library, and what must not occur in some of its files: read from their source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import sptransform

ROOT = Path(sptransform.__file__).parent
FILES = {
    ".".join(("sptransform", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in [*ROOT.rglob("*.py"), *(ROOT / "passes").glob("*.py")]
    if "__pycache__" not in file.parts
}

# A module may import modules of its own tier and of those above it in this list.
TIERS: tuple[tuple[str, ...], ...] = (
    # types, and access to the graph
    ("annotations", "errors", "mesh", "partition", "placement", "printer", "regions", "sizes"),
    # the engine: knows no op and no strategy by name
    ("axes", "calls", "decisions", "inner_axes", "pass_manager", "propagation", "rewriter", "rule_table", "rules", "verifier"),
    # what is known of ops and strategies, and what passes do with it
    ("buckets", "capture", "composition", "functionalize", "masks", "op_rules", "ops", "parameters", "passes")
    + ("stages", "strategies"),
    # what users call
    ("agreement", "backend", "dynamo", "explain", "faults", "fingerprint", "generation", "options", "parallelize")
    + ("placing", "rewrite", "shared_inputs", "stand_ins", "trace"),
    ("",),
)

ENGINE = ("axes", "inner_axes", "pass_manager", "propagation", "rewriter", "verifier")
MODELS = ("bert", "deepseek", "falcon", "gemma", "gpt", "llama", "mistral", "mixtral", "opt-", "phi", "qwen", "vit")


def tier_of(module: str) -> int:
    part = module.removeprefix("sptransform").lstrip(".").split(".")[0]
    for index, names in enumerate(TIERS):
        if part in names:
            return index
    raise AssertionError(f"{module} stands in no tier")


def imports_of(file: Path) -> list[str]:
    """Modules of the library that a file imports when it runs."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names if alias.name.split(".")[0] == "sptransform")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if (node.module or "").split(".")[0] == "sptransform":
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                found.extend(name if name in FILES else node.module for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_obey_the_tiers(module: str) -> None:
    for imported in imports_of(FILES[module]):
        assert tier_of(imported) <= tier_of(module), f"{module} imports {imported}, of a later tier"


def test_no_import_goes_round() -> None:
    edges = {module: {i for i in imports_of(file) if i != module} for module, file in FILES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"imports go round: {' > '.join((*path, module))}"
        if module in done:
            return
        for imported in edges.get(module, ()):
            visit(imported, (*path, module))
        done.add(module)

    for module in edges:
        visit(module, ())


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
    assert "aten" not in code_of(ROOT / f"{name}.py")
    assert "torch.ops" not in code_of(ROOT / f"{name}.py")


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_model_is_named(module: str) -> None:
    text = code_of(FILES[module]).lower()
    for name in MODELS:
        assert re.search(rf"\b{name}", text) is None, f"{module} names {name}"
    assert "transformers" not in text


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_printed(module: str) -> None:
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"), f"{module}:{node.lineno} prints"


@pytest.mark.parametrize("module", sorted(FILES))
def test_only_annotations_knows_where_notes_are_kept(module: str) -> None:
    if module != "sptransform.annotations":
        assert not re.search(r"""meta(\.get\(|\[)['"]sptransform""", FILES[module].read_text())


@pytest.mark.parametrize("module", sorted(FILES))
def test_every_file_begins_with_what_it_is(module: str) -> None:
    text = FILES[module].read_text()
    if text:
        assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
