"""Small mistakes in a source file: every place that can hold one, and the text with it.

A mistake changes one place and leaves the rest of the file as it is to the byte. Left alone is what says nothing of
what a program does, or only of what it tells people: docstrings, annotations, decorators, asserts, messages of errors
and of logs.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "//",
    ast.FloorDiv: "*",
    ast.Div: "*",
    ast.Mod: "//",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
# factors as rules are written: single letters and ellipses between spaces, commas and an arrow
NOTATION = re.compile(r"(([a-z]|\.{3})(, ?| |$)|-> ?)+")
FACTOR_KINDS = ("reduce", "replicated")
MESSAGES = {"describe", "debug", "info", "warning"}


ROOT = Path(__file__).parents[2]
SOURCES = ("sptransform", "passes")


@dataclass(frozen=True)
class Mutation:
    """One mistake: in `path` (from the root of the checkout), characters `start` to `end` become `text`."""

    path: str
    line: int
    kind: str
    start: int
    end: int
    text: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def shown(self, source: str) -> tuple[str, str]:
        """The lines concerned, before and after, on one line each; they name a mutation whatever lines it moves to."""
        first = source.rfind("\n", 0, self.start) + 1
        last = source.find("\n", self.end)
        before, after = source[first:last], self.apply(source[:last])[first:]
        return " ".join(before.split()), " ".join(after.split())


def mutations_of(path: str, source: str) -> list[Mutation]:
    """Every mutation of a file, in the order of the file."""
    return sorted(_Finder(path, source).find(), key=lambda mutation: (mutation.start, mutation.kind))


def source_files() -> list[Path]:
    """What may hold a mistake; `sptransform/passes` is a link to `passes`."""
    found = [file for name in SOURCES for file in (ROOT / name).rglob("*.py")]
    return sorted(file for file in found if (ROOT / "sptransform" / "passes") not in file.parents)


def draw(num: int, seed: int) -> list[Mutation]:
    """Of each kind equally many, as far as there are, from anywhere in the sources."""
    every: dict[str, list[Mutation]] = {kind: [] for kind in KINDS}
    for file in source_files():
        for mutation in mutations_of(str(file.relative_to(ROOT)), file.read_text()):
            every[mutation.kind].append(mutation)
    generator = random.Random(seed)
    for found in every.values():
        generator.shuffle(found)
    drawn: list[Mutation] = []
    while len(drawn) < num and any(every.values()):
        drawn += [found.pop() for found in every.values() if found]
    return drawn[:num]


class _Finder:
    def __init__(self, path: str, source: str) -> None:
        self._path, self._source = path, source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._lines = source.splitlines()

    def find(self) -> Iterator[Mutation]:
        for node in _acting(ast.parse(self._source)):
            for kind, make in KINDS.items():
                for what, text in make(node, self._text):
                    yield Mutation(self._path, what.lineno, kind, *self._span(what), text)

    def _at(self, line: int, column: int) -> int:
        """ast counts columns in bytes."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno or 0, node.end_col_offset or 0)

    def _text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self._span(node)
        return self._source[start:end]


def _acting(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below that decide what the program does."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_silent(child):
                continue
            yield child
            yield from _acting(child)


def _is_silent(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return True
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in MESSAGES
    return isinstance(node, ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr)


# ---------------------------------------------------------------------------------------------------------------
# Kinds of mistakes: from a node, the node to replace and its new text.

Text = Callable[[ast.AST], str]
Changes = Iterator[tuple[ast.AST, str]]


def _comparison(node: ast.AST, text: Text) -> Changes:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield node, f"(({text(node.left)}) {COMPARISONS[type(node.ops[0])]} ({text(node.comparators[0])}))"


def _connective(node: ast.AST, text: Text) -> Changes:
    if isinstance(node, ast.BoolOp):
        other = " or " if isinstance(node.op, ast.And) else " and "
        yield node, f"({other.join(f'({text(value)})' for value in node.values)})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"bool({text(node.operand)})"


def _condition(node: ast.AST, text: Text) -> Changes:
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield node.test, f"not ({text(node.test)})"
    if isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield test, "True"


def _operator(node: ast.AST, text: Text) -> Changes:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield node, f"(({text(node.left)}) {OPERATORS[type(node.op)]} ({text(node.right)}))"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node, f"({text(node.operand)})"


def _constant(node: ast.AST, text: Text) -> Changes:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield node, str(node.value + 1)


def _dropped(node: ast.AST, text: Text) -> Changes:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _is_silent(node.value):
        yield node, "pass"
    if isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break):
        yield node, "pass"
    if isinstance(node, ast.Return) and node.value is not None and text(node.value) != "None":
        yield node, "return None"


def _swapped(node: ast.AST, text: Text) -> Changes:
    if isinstance(node, ast.Call) and len(node.args) > 1:
        first, second = node.args[:2]
        if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred) and text(first) != text(second):
            others = [*node.args[2:], *node.keywords]
            rest = "".join(f", {text(other)}" for other in others)
            yield node, f"{text(node.func)}(({text(second)}), ({text(first)}){rest})"


def _is_notation(value: object) -> bool:
    return isinstance(value, str) and len(value) > 1 and NOTATION.fullmatch(value) is not None


def _letter(node: ast.AST, text: Text) -> Changes:
    """Text in the notation of rules, ``... i k, k j``: one letter becomes another, or an ellipsis a letter."""
    if isinstance(node, ast.Constant) and _is_notation(node.value):
        factors = list(dict.fromkeys(re.findall(r"\w|\.{3}", node.value)))
        for found in re.finditer(r"\w|\.{3}", node.value):
            other = factors[(factors.index(found[0]) + 1) % len(factors)]
            new = other if other != found[0] else "z"
            yield node, repr(node.value[: found.start()] + new + node.value[found.end() :])
    if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.arg in FACTOR_KINDS:
        yield node.value, '""'


KINDS: dict[str, Callable[[ast.AST, Text], Changes]] = {
    "comparison": _comparison,
    "condition": _condition,
    "connective": _connective,
    "constant": _constant,
    "dropped": _dropped,
    "letter": _letter,
    "operator": _operator,
    "swapped": _swapped,
}
