"""Runs for real what a model sets up under a lock at its first call, such as hooks: Dynamo cannot enter locks.

Where Dynamo meets a lock, the function that takes it is called with its arguments, and the capture starts anew. A
function that takes a lock at every call is not a set-up, and is refused.
"""

from __future__ import annotations

import dis
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, NoReturn

import torch

# Private: where Dynamo gives up on a context manager; it has no hook.
from torch._dynamo.exc import Unsupported
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import CellVariable

from sptransform.diagnostics.errors import CaptureError, describe

_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_UNKNOWN = object()
_REBINDING = ("STORE_FAST", "DELETE_FAST", "STORE_DEREF", "DELETE_DEREF")


class TakesLock(Unsupported):
    """Dynamo came to a lock. ``call`` calls the function that takes it; None where its arguments are not known."""

    def __init__(self, code: CodeType, call: Callable[[], Any] | None) -> None:
        super().__init__(f"{code.co_name} takes a lock")
        self.code = code
        self.call = call


def set_up_first(capture: Callable[[], Any]) -> Any:
    """``capture()``, after the functions that it needs to have run.

    Raises:
        CaptureError: one of them takes a lock again, or its arguments are computed by the model.
    """
    seen: set[CodeType] = set()
    while True:
        try:
            with _locks_reported():
                return capture()
        except TakesLock as found:
            if found.call is None or found.code in seen:
                raise CaptureError(
                    describe(
                        "the model takes a lock while it computes, which no graph can",
                        source=f"{found.code.co_filename}:{found.code.co_firstlineno}: def {found.code.co_name}(..)",
                        found="a lock that is taken at every call"
                        if found.call is not None
                        else "a lock, in a function whose arguments the model computes",
                        fix="call that function before the model, or take the lock outside of the forward",
                    )
                ) from None
            seen.add(found.code)
            set_up = found.call
        set_up()


_give_up = InstructionTranslatorBase.unsupported_ctx_graph_break


def _report_lock(translator: Any, context: Any) -> NoReturn:
    if issubclass(context.python_type(), _LOCKS):
        raise TakesLock(translator.f_code, _call_of(translator))
    _give_up(context)


@contextmanager
def _locks_reported() -> Iterator[None]:
    InstructionTranslatorBase.unsupported_ctx_graph_break = _report_lock
    try:
        yield
    finally:
        InstructionTranslatorBase.unsupported_ctx_graph_break = staticmethod(_give_up)


def _call_of(translator: Any) -> Callable[[], Any] | None:
    code = translator.f_code
    if code.co_freevars or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return None
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if any(step.argval in names for step in dis.get_instructions(code) if step.opname in _REBINDING):
        return None  # what it was called with is no longer known
    values = [_value_of(translator.symbolic_locals[name], translator) for name in names]
    if any(value is _UNKNOWN for value in values):
        return None
    function = FunctionType(code, translator.f_globals)
    positional, named = values[: code.co_argcount], names[code.co_argcount :]
    is_recording = torch.is_grad_enabled()

    def call() -> Any:
        with torch.set_grad_enabled(is_recording):
            return function(*positional, **dict(zip(named, values[code.co_argcount :], strict=True)))

    return call


def _value_of(variable: Any, translator: Any) -> Any:
    """The object that a variable of Dynamo stands for; not that of a tensor, which is not there yet.

    Nor one that the model has changed, since Dynamo writes that back when the call is over.
    """
    variable = variable.realize()
    if isinstance(variable, CellVariable):  # a function that the set-up makes reads it too
        variable = translator.output.side_effects.load_cell(variable)
    if translator.output.side_effects.has_pending_mutation(variable):
        return _UNKNOWN
    if variable.is_python_constant():
        found = variable.as_python_constant()
        return _UNKNOWN if isinstance(found, dict | list | set) else found  # a copy of the model's own
    return getattr(variable, "value", _UNKNOWN)
