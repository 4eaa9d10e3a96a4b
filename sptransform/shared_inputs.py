"""Inputs of which each rank has a part: DTensors, as parallelized models return and stages of a pipeline send them.

Under Dynamo such an input is read whole, by the node by which a parameter kept in parts is; capture takes that out, and
propagation then sees an input with placement ``S``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from sptransform.parameters import whole

Call = Callable[..., Any]


def taking_parts(model: nn.Module, call: Call, compiled: Callable[..., Call]) -> Call:
    """``call``, the compiled call of ``model``, that takes DTensors too, by another one that ``compiled`` makes.

    That one is for one length: which sizes Dynamo would leave open differs between ranks with uneven parts.
    """
    of_parts: Call | None = None

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal of_parts
        shapes = _shapes(args, kwargs)
        if not shapes:
            return call(*args, **kwargs)
        if of_parts is None:
            of_parts = compiled(_read_whole, dynamic=False)
        return of_parts(model, shapes, *args, **kwargs)

    return run


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[int]]:
    return [list(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, DTensor)]


def _read_whole(self: nn.Module, shapes: list[list[int]], *args: Any, **kwargs: Any) -> Any:
    # Of a DTensor Dynamo guards how large a rank's part is, which parts of several lengths may be; of numbers, each.
    assert _shapes(args, kwargs) == shapes
    args, kwargs = pytree.tree_map(lambda x: whole(x) if isinstance(x, DTensor) else x, (args, kwargs))
    # Private: what Module.__call__ runs of a module that is not compiled. Traced from here, parameters and inputs have
    # the names they have where Dynamo starts from the module itself.
    return self._call_impl(*args, **kwargs)
