"""What a kernel holds while it runs, beyond its operands and results.

The code of our own kernels is run on fake tensors, and what it allocates and frees is watched. Of torch's own kernels
a table says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary, weakref

from sptransform.cost.op_costs import INNER, num_bytes
from sptransform.ops.ring import blocks

sp = torch.ops.sptransform

# ops whose code is run to find it
_CODE: Mapping[Any, Callable[..., Any]] = {
    sp.attention_block: blocks.attention_block,
    sp.attention_block_backward: blocks.attention_block_backward,
    sp.attention_block_backward_with_mask: blocks.attention_block_backward_with_mask,
}


def scratch_of(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The most bytes that a call of the op holds at a time, without its operands and its results.

    ``args``, ``kwargs``: of the call; tensors are fake, on the device that would run it.
    """
    if packet not in _CODE:
        return _inner(packet, args, kwargs)
    mode = detect_fake_mode((args, kwargs))
    assert mode is not None
    with torch.no_grad(), mode, _Allocations() as found:
        results = _CODE[packet](*args, **kwargs)
    return found.peak - sum(num_bytes(x) for x in pytree.tree_leaves(results))


def _inner(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return INNER[packet](*args, **kwargs) if packet in INNER else 0


class _Allocations(TorchDispatchMode):
    """Watches which memory comes and goes; ``peak`` is the most that was held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a seed; numbers that shapes depend on are not read by kernels
        kwargs = kwargs or {}
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._seen.setdefault(x.untyped_storage(), 0)  # an operand of the kernel, unless seen before
        results = func(*args, **kwargs)
        for x in pytree.tree_leaves(results):
            if isinstance(x, Tensor) and x.untyped_storage() not in self._seen:
                self._add(x.untyped_storage())
        self.peak = max(self.peak, self.live + _inner(func.overloadpacket, args, kwargs))
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        self._seen[storage] = weakref.ref(storage, lambda _: self._free(size))

    def _free(self, size: int) -> None:
        self.live -= size
