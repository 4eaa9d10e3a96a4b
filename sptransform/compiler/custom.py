"""The rules and passes that users bring: checked, and as a text that is equal in all processes with the same code."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from sptransform.capture.autograd_functions import name_of_class
from sptransform.diagnostics.errors import RuleError, UsageError, describe
from sptransform.engine.function_rules import FunctionRules
from sptransform.engine.pass_manager import Pass
from sptransform.graph.body_graphs import FUNCTION
from sptransform.graph.dataflow import is_op
from sptransform.rules.rule import RuleFn
from sptransform.rules.table import OpEntry, overload_of

# their versions say what they do
_VERSIONED = frozenset({"sptransform", "torch", "sympy", *sys.stdlib_module_names})


def checked_rules(rules: Any) -> dict[Any, OpEntry | RuleFn]:
    """Overload -> rule, from what the user passed as ``rules``; of custom autograd.Functions, the op that runs them.

    Raises:
        UsageError: it is no mapping from ops to rules, or an op has two.
    """
    example = "rules={torch.ops.mylib.scale.default: sptransform.rule('... h, h -> ... h')}"
    if not isinstance(rules, Mapping):
        raise UsageError(describe("rules maps ops to rules", found=repr(rules), fix=example))
    found: dict[Any, OpEntry | RuleFn] = {}
    functions: dict[str, OpEntry | RuleFn] = {}
    for op, rule in rules.items():
        if isinstance(op, type) and issubclass(op, torch.autograd.Function):
            functions[name_of_class(op)] = _checked(rule, op.__qualname__, example)
            continue
        try:
            overload = overload_of(op)
        except RuleError as error:
            raise UsageError(describe("rules maps ops to rules", found=str(error), fix=example)) from error
        if overload in found:
            raise UsageError(describe("two rules for one op", found=str(overload), fix="one of them"))
        found[overload] = _checked(rule, overload, example)
    return found | ({FUNCTION: FunctionRules(functions).entry} if functions else {})


def _checked(rule: Any, of: Any, example: str) -> OpEntry | RuleFn:
    if not callable(rule.rule if isinstance(rule, OpEntry) else rule):
        raise UsageError(describe(f"not a rule for {of}", found=repr(rule), fix=example))
    return rule


def identified_rules(rules: Mapping[Any, OpEntry | RuleFn]) -> str:
    return ", ".join(sorted(f"{op}: {identified(rule)}" for op, rule in rules.items())) or "ours"


def identified_passes(passes: Sequence[Pass]) -> str:
    return ", ".join(f"{identified(step)} after {step.after}" for step in passes) or "ours"


def identified(x: Any) -> str:
    """``x`` as text. What has code of the user's in it is a name and a hash: another version of it is another text.

    The hash depends on code, closures and fields, and on the functions, classes and constants of its own package that
    the code names. It does not depend on addresses, file names, line numbers, the seed of hashes, or earlier calls.
    """
    code = _Code()
    content = code.content(x)
    if not code.is_users:
        return _without_address(repr(x))
    name = getattr(x, "__qualname__", type(x).__qualname__)
    return f"{name} {short_hash(repr(content))}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Code:
    """Reads what an object computes, as nested tuples of texts; ``is_users``: it has met code of the user's."""

    def __init__(self) -> None:
        self.is_users = False
        self._seen: dict[int, tuple[int, Any]] = {}  # with the objects, so that no id is given to another one

    def content(self, x: Any) -> Any:
        if x is None or isinstance(x, str | bytes | int | float | complex):
            return repr(x)
        if id(x) in self._seen:
            return f"seen {self._seen[id(x)][0]}"
        self._seen[id(x)] = len(self._seen), x
        if isinstance(x, list | tuple):
            return tuple(map(self.content, x))
        if isinstance(x, Mapping):
            return tuple((self.content(key), self.content(value)) for key, value in x.items())
        if isinstance(x, set | frozenset):
            return self._of_set(x)
        if isinstance(x, CodeType):
            return (x.co_code, x.co_names, x.co_varnames, *map(self.content, x.co_consts))
        if isinstance(x, MethodType):
            return self.content(x.__func__), self.content(x.__self__)
        if isinstance(x, partial):
            return tuple(map(self.content, (x.func, x.args, x.keywords)))
        if isinstance(x, torch.Tensor):
            entries = x.detach().cpu().contiguous().flatten().view(torch.uint8)
            return str(x.dtype), tuple(x.shape), bytes(entries.tolist())
        if isinstance(x, FunctionType | type):
            if _package_of(x) in _VERSIONED:
                return x.__qualname__
            self.is_users = True
            return (x.__qualname__, *(self._of_function(x) if isinstance(x, FunctionType) else self._of_class(x)))
        return self._of_object(x)

    def _of_set(self, x: set[Any] | frozenset[Any]) -> tuple[str, ...]:
        """Its elements each for itself, since their order depends on the seed of hashes."""
        texts = []
        for each in x:
            code = _Code()
            texts.append(repr(code.content(each)))
            self.is_users |= code.is_users
        return tuple(sorted(texts))

    def _of_object(self, x: Any) -> tuple[Any, ...]:
        """Its class and what it keeps: of dataclasses the fields, no caches, and of classes of others nothing."""
        kind = type(x)
        if is_dataclass(x):
            kept = [field.name for field in fields(x)]
        elif _package_of(kind) in _VERSIONED:
            return kind.__qualname__, str(x) if is_op(x) or hasattr(x, "overloads") else ""
        else:
            slots = [name for base in kind.__mro__ for name in getattr(base, "__slots__", ())]
            kept = [name for name in (*getattr(x, "__dict__", ()), *slots) if not _is_cache(kind, name)]
        return self.content(kind), tuple((name, self.content(getattr(x, name, None))) for name in kept)

    def _of_function(self, x: FunctionType) -> Iterator[Any]:
        cells = [_contents(cell) for cell in x.__closure__ or ()]
        yield from map(self.content, (x.__code__, x.__defaults__, x.__kwdefaults__, cells))
        for name in sorted(_names(x.__code__) & x.__globals__.keys()):
            value = x.__globals__[name]
            is_own = isinstance(value, FunctionType | type) and _package_of(value) == _package_of(x)
            # lists and dicts may be caches, which calls change
            if is_own or is_dataclass(value) or isinstance(value, str | bytes | int | float | tuple | frozenset):
                yield name, self.content(value)

    def _of_class(self, x: type) -> Iterator[Any]:
        yield from map(self.content, x.__bases__)
        for name, member in sorted(vars(x).items()):
            member = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
            if isinstance(member, FunctionType) or not name.startswith("_"):
                yield name, self.content(member)


def _package_of(x: Any) -> str:
    """The top-level package that a function or class was written in; a wrapper may call itself otherwise."""
    module = x.__globals__.get("__name__") if isinstance(x, FunctionType) else x.__module__
    return (module or "").split(".")[0]


def _is_cache(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), cached_property)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _names(code: CodeType) -> set[str]:
    """The global names that the code, and the functions in it, may read."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _without_address(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
