"""Bodies: the forward and the backward of a custom autograd.Function as text, so that they can be an argument of an op.

A body is the same on all ranks that share evenly::

    operands(%0, %1); %2 = aten.mul.Tensor(%0, %1); results(%2);
    given(%3); %4 = aten.mul.Tensor(%3, %1); gradients(%4, None)

``given`` are the gradients of the results, ``gradients`` those of the operands. The backward may read any value of the
forward, which then is saved. Every step is an overload of ``torch.ops``, or picks one of several results, ``%5[1]``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf, nan
from typing import Any

import torch

_NUMBERS = {"inf": inf, "nan": nan}


@dataclass(frozen=True)
class Value:
    """The value of this index."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Step:
    """One op and the value it gives; its arguments are :class:`Value`, constants, and lists of them."""

    value: Value
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        if self.target is operator.getitem:
            return f"{self.value} = {self.args[0]}[{self.args[1]}]"
        arguments = [*map(_written, self.args), *(f"{key}={_written(x)}" for key, x in self.kwargs)]
        return f"{self.value} = {self.target}({', '.join(arguments)})"

    @property
    def read(self) -> list[Value]:
        """The values that it reads."""
        return list(_values_in((self.args, [x for _, x in self.kwargs])))

    def arguments(self, values: Mapping[Value, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Its arguments, given the values so far."""
        return [_put(x, values) for x in self.args], {key: _put(x, values) for key, x in self.kwargs}


@dataclass(frozen=True)
class Body:
    """A forward and a backward; ``str`` writes what :func:`parse` reads."""

    operands: tuple[Value, ...]
    forward: tuple[Step, ...]
    results: tuple[Value, ...]
    given: tuple[Value, ...]
    backward: tuple[Step, ...]
    gradients: tuple[Value | None, ...]

    def __str__(self) -> str:
        return "; ".join(
            (
                f"operands({_listed(self.operands)})",
                *map(str, self.forward),
                f"results({_listed(self.results)})",
                f"given({_listed(self.given)})",
                *map(str, self.backward),
                f"gradients({_listed(self.gradients)})",
            )
        )

    @cached_property
    def saved(self) -> tuple[Value, ...]:
        """The values of the forward that the backward reads, in order."""
        own = {*self.given, *(step.value for step in self.backward)}
        read = [x for step in self.backward for x in step.read] + [x for x in self.gradients if x is not None]
        return tuple(dict.fromkeys(x for x in read if x not in own))


def run(steps: Sequence[Step], values: MutableMapping[Value, Any]) -> None:
    """Compute the steps, and add what they give to ``values``."""
    for step in steps:
        args, kwargs = step.arguments(values)
        values[step.value] = step.target(*args, **kwargs)


@lru_cache(maxsize=1024)
def parse(text: str) -> Body:
    """The body written as ``text``.

    Raises:
        ValueError: the text is no body.
    """
    parts: dict[str, tuple[Any, ...]] = {}
    steps: list[Step] = []
    forward: tuple[Step, ...] = ()
    try:
        for statement in ast.parse(re.sub(r"%(\d+)", r"_\1", text)).body:
            if isinstance(statement, ast.Assign):
                steps.append(_read_step(_read(statement.targets[0]), statement.value))
                continue
            name = statement.value.func.id
            parts[name] = tuple(map(_read, statement.value.args))
            if name == "results":
                forward, steps = tuple(steps), []
        return Body(forward=forward, backward=tuple(steps), **parts)
    except (AttributeError, KeyError, SyntaxError, TypeError) as error:
        raise ValueError(f"no body of an autograd.Function: {text!r}") from error


def is_constant(x: Any) -> bool:
    """Whether an argument can be written."""
    if isinstance(x, list | tuple):
        return all(map(is_constant, x))
    kinds = str | int | float | torch.dtype | torch.device | torch.layout | torch.memory_format
    return x is None or isinstance(x, kinds | Value)


def _written(x: Any) -> str:
    if isinstance(x, list | tuple):
        return f"[{', '.join(map(_written, x))}]"
    if isinstance(x, torch.device):
        return f"device({str(x)!r})"
    return str(x) if isinstance(x, Value) else repr(x)


def _listed(values: Sequence[Value | None]) -> str:
    return ", ".join(map(str, values))


def _put(x: Any, values: Mapping[Value, Any]) -> Any:
    if isinstance(x, list | tuple):
        return [_put(each, values) for each in x]
    return values[x] if isinstance(x, Value) else x


def _values_in(x: Any) -> Sequence[Value]:
    if isinstance(x, list | tuple):
        return [value for each in x for value in _values_in(each)]
    return [x] if isinstance(x, Value) else []


def _read_step(value: Value, x: ast.expr) -> Step:
    if isinstance(x, ast.Subscript):
        return Step(value, operator.getitem, (_read(x.value), _read(x.slice)))
    namespace, packet, overload = ast.unparse(x.func).split(".")
    target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return Step(value, target, tuple(map(_read, x.args)), tuple((k.arg, _read(k.value)) for k in x.keywords))


def _read(x: ast.expr) -> Any:
    if isinstance(x, ast.UnaryOp):
        return -_read(x.operand)
    if isinstance(x, ast.List):
        return [*map(_read, x.elts)]
    if isinstance(x, ast.Call):
        return torch.device(*map(_read, x.args))
    if isinstance(x, ast.Constant):
        return x.value
    if isinstance(x, ast.Attribute):  # torch.float32
        return getattr(torch, x.attr)
    return Value(int(x.id[1:])) if x.id[0] == "_" else _NUMBERS[x.id]
