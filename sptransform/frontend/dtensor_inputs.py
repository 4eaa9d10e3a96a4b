"""Inputs of which each rank has a part: DTensors, as parallelized models return and stages of a pipeline send them.

Under Dynamo such an input is read whole, by the node by which a parameter kept in parts is; capture takes that out, and
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

from sptransform.parameters.parts import stored_in, whole

Call = Callable[..., Any]


def taking_parts(model: nn.Module, call: Call, compiled: Callable[..., Call], num_ranks: int) -> Call:
    """``call``, the compiled call of ``model``, that takes DTensors too, by another one that ``compiled`` makes.

    That one is for one length: which sizes Dynamo would leave open differs between ranks with uneven parts.
    """
    of_parts: Call | None = None

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal of_parts
        given = _dtensors(args, kwargs)
        if not given:
            return call(*args, **kwargs)
        for x in given:
            stored_in(x)  # an error here says more than one while Dynamo traces
        if num_ranks == 1:
            args, kwargs = pytree.tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, (args, kwargs))
            return call(*args, **kwargs)
        if of_parts is None:
            # Dynamo limits how often it compiles one piece of code, and this is a piece for each model
            own = FunctionType(_read_whole.__code__.replace(), globals())
            of_parts = compiled(own, dynamic=False)
        return of_parts(model, [list(x.shape) for x in given], *args, **kwargs)

    return run


def _dtensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[DTensor]:
    return [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, DTensor)]


def _read_whole(self: nn.Module, shapes: list[list[int]], *args: Any, **kwargs: Any) -> Any:
    # Of a DTensor Dynamo guards how large a rank's part is, which parts of several lengths may be; of numbers, each.
    assert [list(x.shape) for x in _dtensors(args, kwargs)] == shapes
    args, kwargs = pytree.tree_map(lambda x: whole(x) if isinstance(x, DTensor) else x, (args, kwargs))
    # Private: what Module.__call__ runs of a module that is not compiled. Traced from here, parameters have the names
    # they have where Dynamo starts from the module itself; positional inputs are called args.0, args.1 ...
    return self._call_impl(*args, **kwargs)
