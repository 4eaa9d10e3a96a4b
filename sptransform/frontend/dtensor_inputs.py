"""Sharded inputs: DTensors, as parallelized models return them and pipeline stages send them.

Under Dynamo, :func:`full_tensor` reads such an input, as it does sharded parameters. Capture removes that node, and
propagation then sees an input with placement ``S``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from sptransform.compiler.sharded_output import as_dtensor
from sptransform.parameters.parts import full_tensor, stored_in

Call = Callable[..., Any]


def taking_parts(model: nn.Module, call: Call, compiled: Callable[..., Call], num_ranks: int) -> Call:
    """Let ``call``, the compiled call of ``model``, take DTensors: those go to another call that ``compiled`` makes.

    That one has static shapes: with uneven shards, Dynamo would leave different sizes open on different ranks.
    """
    of_parts: Call | None = None

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal of_parts
        given = _dtensors(args, kwargs)
        if not given:
            return call(*args, **kwargs)
        # Dynamo would trace what torch functions do on what another parallelized model has returned
        args, kwargs = pytree.tree_map(lambda x: as_dtensor(x) if isinstance(x, DTensor) else x, (args, kwargs))
        for x in given:
            stored_in(x)  # check here: an error while Dynamo traces would say less
        if num_ranks == 1:
            args, kwargs = pytree.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, (args, kwargs))
            return call(*args, **kwargs)
        if of_parts is None:
            # Dynamo limits how often it compiles one code object, so each model gets its own
            own = FunctionType(_read_full.__code__.replace(), globals())
            of_parts = compiled(own, dynamic=False)
        return of_parts(model, [list(x.shape) for x in given], *args, **kwargs)

    return run


def _dtensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[DTensor]:
    return [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, DTensor)]


def _read_full(self: nn.Module, shapes: list[list[int]], *args: Any, **kwargs: Any) -> Any:
    # Dynamo guards a DTensor's local size, which different global lengths can share: guard the global shapes.
    assert [list(x.shape) for x in _dtensors(args, kwargs)] == shapes
    args, kwargs = pytree.tree_map(lambda x: full_tensor(x) if isinstance(x, DTensor) else x, (args, kwargs))
    # Private: what Module.__call__ runs for a module that is not compiled. Parameters get the same names as when Dynamo
    # starts from the module itself; positional inputs are called args.0, args.1 ...
    return self._call_impl(*args, **kwargs)
