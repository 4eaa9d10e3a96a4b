"""The collectives that really run, counted where they are dispatched, compiled or not."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# An op of ours may hold a collective in its kernel: such kernels run under the mode as well.
OUR_NAMESPACES = ("sp", "sptransform")


@dataclass(frozen=True)
class Collective:
    """One collective as this rank issued it; `sent_bytes` leave the rank, as a ring would send them.

    `call` tells calls of our ops from each other: None outside of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    input_bytes: int
    sent_bytes: int
    group_size: int
    input_splits: tuple[int, ...] | None = None
    output_splits: tuple[int, ...] | None = None
    call: int | None = None


def num_by_name(collectives: Iterable[Collective]) -> dict[str, int]:
    """How many of each, by name."""
    return dict(Counter(collective.name for collective in collectives))


RINGS = ("ring_attention", "ring_attention_backward")
RUN_NAMES = {
    "all_gather_into_tensor": "all_gather",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "hop": "send_recv",
    "reduce_scatter_tensor": "reduce_scatter",
}


def by_message(collectives: Iterable[Collective]) -> list[tuple[str, int, int]]:
    """(kind, count, bytes) as `explain` counts them, in order: all hops that one op makes are one entry."""
    found: list[tuple[str, int, int]] = []
    last = None
    for collective in collectives:
        kind = RUN_NAMES[collective.name]
        if kind == "send_recv" and last == collective.call:
            _, count, sent_bytes = found.pop()
            found.append((kind, count + 1, sent_bytes + collective.sent_bytes))
        else:
            found.append((kind, 1, collective.sent_bytes))
        last = collective.call
    return found


class CountCollectives(TorchDispatchMode):
    """Records each functional collective that runs inside, in order, in `collectives`."""

    # attention in a checkpointed region and checks of errors come wrapped in such operators; none holds a collective
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self._calls = 0
        self._inside: tuple[int, str] | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this, torch.compile would silently run the original model under the mode."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Tracing dispatches collectives of fake tensors: they move nothing.
        if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if func.namespace == "_c10d_functional" and func.overloadpacket.__name__ != "wait_tensor":
            self.collectives.extend(self._named(x) for x in _collectives(func, args, kwargs))
        if func.namespace in OUR_NAMESPACES:
            outside, self._calls = self._inside, self._calls + 1
            self._inside = self._calls, func.overloadpacket.__name__
            try:
                with self:
                    return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
            finally:
                self._inside = outside
        return func(*args, **kwargs)

    def _named(self, collective: Collective) -> Collective:
        """What a ring sends is a hop: to one rank, from one rank."""
        if self._inside is None:
            return collective
        call, op = self._inside
        name = "hop" if op in RINGS else collective.name
        return replace(collective, name=name, call=call)


def _collectives(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Collective]:
    """One entry for each tensor moved; in-place, out= and coalesced forms go by their plain name."""
    arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    name = func.overloadpacket.__name__.removesuffix("_").removesuffix("_out").removesuffix("_coalesced")
    group = _resolve(arguments["group_name"])
    inputs = arguments["input"] if "input" in arguments else arguments["inputs"]
    splits = [
        tuple(int(size) for size in arguments[key]) if key in arguments else None
        for key in ("input_split_sizes", "output_split_sizes")
    ]
    return [
        Collective(
            name=name,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            input_bytes=tensor.nbytes,
            sent_bytes=_sent_bytes(name, tensor, group, splits[0]),
            group_size=group.size(),
            input_splits=splits[0],
            output_splits=splits[1],
        )
        for tensor in pytree.tree_leaves(inputs)
    ]


def _resolve(group: Any) -> dist.ProcessGroup:
    """A group, by its name where the op holds a name."""
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return group


def _sent_bytes(
    name: str, tensor: torch.Tensor, group: dist.ProcessGroup, input_splits: tuple[int, ...] | None
) -> int:
    if name == "all_to_all_single" and input_splits:
        row_bytes = tensor.nbytes // max(1, tensor.shape[0])
        return row_bytes * (sum(input_splits) - input_splits[group.rank()])
    return _SENT_BYTES[name](tensor.nbytes, group.size())


# From the bytes of a rank's input and the number of ranks.
_SENT_BYTES: dict[str, Callable[[int, int], int]] = {
    "all_gather_into_tensor": lambda num_bytes, num_ranks: num_bytes * (num_ranks - 1),
    "all_reduce": lambda num_bytes, num_ranks: 2 * num_bytes * (num_ranks - 1) // num_ranks,
    "all_to_all_single": lambda num_bytes, num_ranks: num_bytes * (num_ranks - 1) // num_ranks,
    "broadcast": lambda num_bytes, num_ranks: num_bytes,
    "reduce_scatter_tensor": lambda num_bytes, num_ranks: num_bytes * (num_ranks - 1) // num_ranks,
}
