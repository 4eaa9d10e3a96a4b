"""docs/troubleshooting.md has every message: what the sources raise and warn of, and what goldens show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import product

import sptransform
from tests.support.golden import FOLDER
from tests.support.pages import PAGES, ROOT

PAGE = PAGES["troubleshooting.md"].read_text()
ERRORS = {
    name
    for name, x in vars(sptransform).items()
    if isinstance(x, type) and issubclass(x, sptransform.SPTransformError)
}
ANY = "<>"  # what differs from case to case, in a message as in the page


@cache
def in_the_page() -> frozenset[str]:
    """Messages of the page: what is code in the first columns of its tables."""
    cells = re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
    return frozenset(re.sub("<[a-z]*>", ANY, found) for cell in cells for found in re.findall("`([^`]+)`", cell))


@cache
def in_the_sources() -> dict[str, str]:
    """Messages that the library raises or logs as warnings -> where."""
    found: dict[str, str] = {}
    files = {file.resolve() for folder in ("sptransform", "passes") for file in (ROOT / folder).rglob("*.py")}
    for file in sorted(files):
        for line, message in _messages(ast.parse(file.read_text())):
            if len(message.replace(ANY, "")) > len(" has "):  # others are made of messages
                found.setdefault(" ".join(message.split()), f"{file}:{line}")
    return found


def _messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for function in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = ast.unparse(node.func)
            if name.endswith(".warning") and isinstance(text := node.args[0], ast.Constant):
                yield node.lineno, re.sub("%[sd]", ANY, text.value)
            elif name == "describe" or name in ERRORS:
                yield from ((node.lineno, text) for text in _texts(node.args[0], function, calls))


def _texts(node: ast.expr, function: ast.AST, calls: list[ast.Call]) -> list[str]:
    """All that an expression may be, if it is text; a variable is what the function assigns, or gets as an argument."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, function, calls) + _texts(node.orelse, function, calls)
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in product(*(_texts(part, function, calls) or [ANY] for part in node.values))]
    if isinstance(node, ast.FormattedValue):
        return _texts(node.value, function, calls) if isinstance(node.value, ast.IfExp) else []
    if not isinstance(node, ast.Name) or not isinstance(function, ast.FunctionDef):
        return []
    given = [x.value for x in ast.walk(function) if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == node.id]
    parameters = [argument.arg for argument in function.args.args]
    if node.id in parameters:
        at = parameters.index(node.id)
        given = [x.args[at] for x in calls if ast.unparse(x.func) == function.name and len(x.args) > at]
    return [text for x in given for text in _texts(x, ast.Module([], []), calls)]


def _is_one(one: str, other: str) -> bool:
    """Whether two messages with gaps may be one."""
    return any(
        re.fullmatch(".*?".join(map(re.escape, x.split(ANY))), y.replace(ANY, "x"), re.DOTALL)
        for x, y in ((one, other), (other, one))
    )


def test_every_message_of_the_sources_is_in_the_page() -> None:
    missing = [f"{where}: {message}" for message, where in in_the_sources().items()
               if not any(_is_one(message, known) for known in in_the_page())]  # fmt: skip
    assert not missing, "write what helps into docs/troubleshooting.md:\n" + "\n".join(missing)
    assert len(in_the_sources()) > 140


def test_every_message_of_the_page_is_in_the_sources() -> None:
    stale = [known for known in in_the_page() if not any(_is_one(message, known) for message in in_the_sources())]
    assert not stale


def test_every_golden_message_is_in_the_page() -> None:
    shown = {
        line
        for file in FOLDER.glob("*.txt")
        for line in re.findall(r"^## message\n(.*)", file.read_text(), re.MULTILINE)
        if not line.startswith("%")
    }
    shown |= set(re.findall(r"^## \w+\n(.*)", (FOLDER / "replica_mismatch.txt").read_text(), re.MULTILINE))
    assert [line for line in sorted(shown) if not any(_is_one(known, line) for known in in_the_page())] == []


def test_every_error_has_a_section() -> None:
    sections = set(re.findall(r"^##+ (\w+Error)$", PAGE, re.MULTILINE))
    assert sections == ERRORS - {"SPTransformError"}
    assert "sptransform.SPTransformError" in PAGE
