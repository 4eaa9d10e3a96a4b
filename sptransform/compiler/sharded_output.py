"""What a parallelized model returns of a sequence: a DTensor on which torch functions give what one device gives.

A loss behind the call meets logits that are cut along the sequence, or along the vocabulary. Torch's own DTensor
refuses to mix them with plain tensors. Its losses are terms of a sum, of which ``item()`` reads this rank's, and some
are wrong (a mean over labels of which some are ignored). So every torch function on such a tensor is rewritten as a
model is (:mod:`sptransform.compiler.calls_behind`): what comes out with the cut axis is again such a tensor, and what
comes out without it, such as a loss, is a plain tensor, equal on all ranks, with the whole gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Private API: how Dynamo learns to let a function be, and whether it traces one.
from torch._dynamo.exc import Unsupported
from torch._guards import TracingContext
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from sptransform.parameters.shared import COMPUTED

# what concerns the object and its place in autograd's graph: DTensor's own are right
_OF_THE_OBJECT = {
    Tensor.__format__,
    Tensor.__hash__,
    Tensor.__repr__,
    Tensor.backward,
    Tensor.requires_grad_,
    Tensor.retain_grad,
    torch.autograd.backward,
}
# what gives gradients, which are cut as their tensors are
_OF_GRADIENTS = {Tensor.grad.__get__, torch.autograd.grad}
# Dynamo, which asks a tensor what it is before it traces a function, then runs that function as it is
_TRACED = (
    "torch.compile does not trace functions of what a parallelized model returns in parts: each is compiled alone; "
    "where they must be traced, as with fullgraph=True, give them x.full_tensor(), or parallelize(..., outputs='full')"
)


class ShardedOutput(DTensor):
    """A DTensor placed ``Shard`` or ``Replicate`` on each mesh dim, contiguous on each rank; see above.

    ``to_local()``, ``full_tensor()``, ``redistribute(..)``, ``placements`` and ``device_mesh`` are those of every
    DTensor. ``calls`` runs a torch function, given its positional and keyword arguments.
    """

    calls: Callable[..., Any]

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (of_attribute := getattr(func, "__name__", "") in ("__get__", "__set__")) and func in COMPUTED:
            func, of_attribute = COMPUTED[func], False
        calls = next(x.calls for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, cls))
        if func is Tensor.register_hook:
            args = args[0], _on_sharded(args[1], calls)
        elif not (of_attribute or func in _OF_THE_OBJECT or func in _OF_GRADIENTS):
            if TracingContext.try_get() is not None:
                raise Unsupported(_TRACED, skip_frame=True)
            return calls(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if func in _OF_GRADIENTS:
            found = pytree.tree_map(lambda x: sharded_output(x, calls), found)
        return found

    def __deepcopy__(self, memo: Any) -> Any:
        return sharded_output(copy.deepcopy(as_dtensor(self), memo), self.calls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return as_dtensor(self).__reduce_ex__(protocol)


def _on_sharded(hook: Callable[[Any], Any], calls: Callable[..., Any]) -> Callable[[Any], Any]:
    """A hook on a gradient, which gets a sharded output, and may return a whole tensor."""

    def run(grad: DTensor) -> Any:
        found = hook(sharded_output(another(grad), calls))
        if isinstance(found, Tensor) and not isinstance(found, DTensor):
            found = DTensor.from_local(found, grad.device_mesh, run_check=False)
        if not isinstance(found, DTensor):
            return found
        return as_dtensor(found).redistribute(placements=grad.placements)

    return run


def as_dtensor(x: DTensor) -> DTensor:
    """The same tensor as torch's own DTensor, with its gradient."""
    return another(x) if isinstance(x, ShardedOutput) else x


def another(x: DTensor) -> DTensor:
    """A DTensor with the same parts. It is no view of ``x``: torch.compile asks a view's base what it is."""
    with torch._C.DisableTorchFunctionSubclass():
        how = {"run_check": False, "shape": x.shape, "stride": x.stride()}
        return DTensor.from_local(x.to_local(), x.device_mesh, x.placements, **how)


def sharded_output(x: Any, calls: Callable[..., Any]) -> Any:
    """``x``; if it is a DTensor, it becomes a :class:`ShardedOutput` whose functions run through ``calls``."""
    if isinstance(x, DTensor):
        x.__class__ = ShardedOutput
        x.calls = calls
    return x
