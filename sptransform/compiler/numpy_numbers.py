"""Lets Dynamo compute whole numbers that numpy makes of numbers: ``np.prod(x.shape[1:])`` is a size, no tensor's entry.

Dynamo gives such a function a tensor, and a size that is read from it would be data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

# Private: Dynamo's view of a numpy function; there is no option for this.
from torch._dynamo.variables import ConstantVariable, NumpyVariable

_call = NumpyVariable.call_function


def _compute(self: Any, tx: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [*args, *kwargs.values()]
    if _is_of_arguments_alone(self.value) and all(x.is_python_constant() for x in given):
        named = {name: x.as_python_constant() for name, x in kwargs.items()}
        found = self.value(*(x.as_python_constant() for x in args), **named)
        if isinstance(found, Integral) and not isinstance(found, bool):
            return ConstantVariable.create(int(found))
    return _call(self, tx, args, kwargs)


def _is_of_arguments_alone(function: Any) -> bool:
    """Whether the function computes from its arguments alone; those of ``numpy.random`` do not."""
    return callable(function) and getattr(function, "__module__", None) == "numpy"


@contextmanager
def numbers_of_numpy() -> Iterator[None]:
    """Computes them, inside."""
    NumpyVariable.call_function = _compute
    try:
        yield
    finally:
        NumpyVariable.call_function = _call
