"""What a kernel holds while it runs, beyond its operands and results.

The code of our own kernels is run on fake tensors, and what it allocates and frees is watched. Of torch's own kernels
a table says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Private: fakes of one graph share a mode; watching what comes and goes needs to see every op, and weak references
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary, weakref

from sptransform.cost.op_costs import INNER, num_bytes
from sptransform.ops.ring import blocks
from sptransform.ops.ring.plan import TILE

aten, sp = torch.ops.aten, torch.ops.sptransform

# ops whose code is run to find it: attention of blocks
_CODE: Mapping[Any, Callable[..., Any]] = {
    sp.attention_block: blocks.attention_block,
    sp.attention_block_backward: blocks.attention_block_backward,
    sp.attention_block_backward_with_mask: blocks.attention_block_backward_with_mask,
}
_OF_KEYS = {"key", "value"}  # other operands of these, but for masks, have the queries' rows; dimension 2
_SHORT, _LONG = 4 * TILE, 8 * TILE


def scratch_of(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The most bytes that a call of the op holds at a time, without its operands and its results.

    ``args``, ``kwargs``: of the call; tensors are fake, on the device that would run it.
    """
    if packet not in _CODE:
        return _inner(packet, args, kwargs)
    names = [argument.name for argument in packet.default._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    size = given["query"].shape[2]
    if size <= _LONG or given["mask"] is not None:
        return _watched(packet, given)
    # without a mask, what is held grows evenly with the rows: a tile of them, by the keys, and sums
    short, long = (_watched(packet, _with_rows(given, rows)) for rows in (_SHORT, _LONG))
    return short + (long - short) * (size - _SHORT) // (_LONG - _SHORT)


def _watched(packet: Any, given: dict[str, Any]) -> int:
    mode = detect_fake_mode(given)
    assert mode is not None
    with torch.no_grad(), mode, _Allocations() as found:
        results = _CODE[packet](**given)
    return found.peak - sum(num_bytes(x) for x in pytree.tree_leaves(results))


def _with_rows(given: dict[str, Any], rows: int) -> dict[str, Any]:
    """The call with so many queries, and keys in proportion."""
    keys = max(given["key"].shape[2] * rows // given["query"].shape[2], 1)
    with detect_fake_mode(given):
        return {
            name: x.narrow(2, 0, keys if name in _OF_KEYS else rows) if isinstance(x, Tensor) and x.dim() > 2 else x
            for name, x in given.items()
        }


def _inner(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return INNER[packet](*args, **kwargs) if packet in INNER else 0


class _Allocations(TorchDispatchMode):
    """Watches which memory comes and goes; ``peak`` is the most that was held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 0  # a seed: nothing else that a kernel reads decides what it holds
        kwargs = kwargs or {}
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._seen.setdefault(x.untyped_storage(), None)  # an operand of the kernel, unless seen before
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
