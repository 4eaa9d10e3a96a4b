"""The rules and passes that users bring: checked, and as a text that is equal in all processes with the same code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from sptransform.diagnostics.errors import RuleError, UsageError, describe
from sptransform.engine.pass_manager import Pass
from sptransform.rules.rule import RuleFn
from sptransform.rules.table import OpEntry, overload_of

# the version of the package, and of torch, says what these do
_VERSIONED = ("sptransform", "torch", "builtins", "sympy")


def checked_rules(rules: Any) -> dict[Any, OpEntry | RuleFn]:
    """Overload -> rule, from what the user passed as ``rules``.

    Raises:
        UsageError: it is no mapping from ops to rules, or an op has two.
    """
    example = "rules={torch.ops.mylib.scale.default: sptransform.rule('... h, h -> ... h')}"
    if not isinstance(rules, Mapping):
        raise UsageError(describe("rules maps ops to rules", found=repr(rules), fix=example))
    found: dict[Any, OpEntry | RuleFn] = {}
    for op, rule in rules.items():
        try:
            overload = overload_of(op)
        except RuleError as error:
            raise UsageError(describe("rules maps ops to rules", found=str(error), fix=example)) from error
        if not isinstance(rule, OpEntry) and not callable(rule):
            raise UsageError(describe(f"not a rule for {overload}", found=repr(rule), fix=example))
        if overload in found:
            raise UsageError(describe("two rules for one op", found=str(overload), fix="one of them"))
        found[overload] = rule
    return found


def identified(x: Any) -> str:
    """``x`` as text, with a hash of the user's code in it, if there is any: another version of it is another text.

    The hash depends on code, closures, fields, and what of its own file the code calls. It does not depend on
    addresses, file names or line numbers.
    """
    code = _Code()
    content = code.content(x)
    text = _without_address(repr(x))
    return f"{text} {hashlib.sha256(repr(content).encode()).hexdigest()[:16]}" if code.is_users else text


def identified_rules(rules: Mapping[Any, OpEntry | RuleFn]) -> str:
    return ", ".join(f"{op}: {identified(rule)}" for op, rule in rules.items()) or "ours"


def identified_passes(passes: Sequence[Pass]) -> str:
    return ", ".join(f"{identified(step)} after {step.after}" for step in passes) or "ours"


class _Code:
    """Reads what an object computes, as nested tuples of texts; ``is_users``: it has met code of the user's."""

    def __init__(self) -> None:
        self.is_users = False
        self._seen: set[int] = set()

    def content(self, x: Any) -> Any:
        if x is None or isinstance(x, str | bytes | int | float | complex):
            return repr(x)
        if isinstance(x, CodeType):
            return (x.co_code, x.co_names, x.co_varnames, *map(self.content, x.co_consts))
        if isinstance(x, set | frozenset):
            return tuple(sorted(repr(self.content(each)) for each in x))
        if isinstance(x, Mapping):
            return tuple((self.content(key), self.content(value)) for key, value in x.items())
        if isinstance(x, list | tuple):
            return tuple(map(self.content, x))
        if id(x) in self._seen:
            return "seen"
        self._seen.add(id(x))
        if isinstance(x, FunctionType | type):
            if (x.__module__ or "").split(".")[0] in _VERSIONED:
                return x.__qualname__
            self.is_users = True
            return (x.__qualname__, *(self._of_function(x) if isinstance(x, FunctionType) else self._of_class(x)))
        if isinstance(x, MethodType):
            return self.content(x.__func__), self.content(x.__self__)
        if isinstance(x, partial):
            return tuple(map(self.content, (x.func, x.args, x.keywords)))
        if is_dataclass(x):  # its fields: what it keeps besides are caches
            return self.content(type(x)), tuple(self.content(getattr(x, field.name)) for field in fields(x))
        if hasattr(x, "__dict__") and not isinstance(x, ModuleType):
            return self.content(type(x)), self.content(vars(x))
        return _without_address(getattr(x, "__name__", repr(x)))

    def _of_function(self, x: FunctionType) -> Iterator[Any]:
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        yield from map(self.content, (x.__code__, x.__defaults__, x.__kwdefaults__, cells))
        for name in sorted(_names(x.__code__) & x.__globals__.keys()):  # what it calls, and constants
            yield name, self.content(x.__globals__[name])

    def _of_class(self, x: type) -> Iterator[Any]:
        yield from map(self.content, x.__bases__)
        for name, member in sorted(vars(x).items()):
            member = getattr(member, "__func__", getattr(member, "fget", member))  # of methods, and of properties
            if isinstance(member, FunctionType) or not name.startswith("__"):
                yield name, self.content(member)


def _names(code: CodeType) -> set[str]:
    """The global names that the code, and the functions in it, may read."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _without_address(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
