"""What one rank's training step is made of, as data: ops in program order, forward then backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Message:
    """What one op sends.

    Attributes:
        kind: "all_to_all", "all_gather", "reduce_scatter", "all_reduce", or "send_recv" to and from one neighbour each.
        bytes_sent: what this rank sends to others. Of an all-reduce of n bytes, 2(N-1)/N n.
        ranks: the global ranks of the group, in the group's order.
    """

    kind: str
    bytes_sent: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """One op of a step, or pointwise ops that a compiler fuses into one kernel.

    Attributes:
        name: of the graph's node; of the last one of fused nodes.
        op: as printed, such as ``aten.mm``; of fused nodes, their number and the last one.
        kind: "matmul", "attention", "memory" (time is that of reading and writing), "message", which starts a
            collective, or "wait", which ends it.
        direction: "forward" or "backward". What the backward computes again is backward.
        layer: path of the module; "" is the model itself.
        source_line: ``file:line: code`` of the user's op; None where there is none.
        dtype: of the operands, as torch prints it without "torch.".
        flops: 2 for each multiply-add. Attention counts visible pairs only.
        traffic: bytes of device memory read and written: every operand and result once.
        sizes: what a kernel's efficiency depends on. Of a matmul "m", "n", "k", "batch"; of attention "batch",
            "heads", "key_heads", "queries", "keys", "dim", "value_dim".
        message: of "message", what is sent; of "wait", what is waited for.
        allocates: the new memory that the op's results take, in bytes, piece by piece.
        frees: the pieces that nobody reads after this op.
        scratch: bytes that the kernel holds while it runs, beyond its operands and results.
        copies: how many equal layers of the model this op stands for, one after the other.
        run: which equal layers these are: path of the first that stands for others; "" where ``copies`` is 1.
        ring: of an op in a ring, the node of the ring and the step's number; None elsewhere.
    """

    name: str
    op: str
    kind: str
    direction: str
    layer: str
    source_line: str | None = None
    dtype: str = ""
    flops: int = 0
    traffic: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    message: Message | None = None
    allocates: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    scratch: int = 0
    copies: int = 1
    run: str = ""
    ring: tuple[str, int] | None = None

    @property
    def allocated(self) -> int:
        """Bytes of new memory that the op's results take."""
        return sum(self.allocates)

    @property
    def freed(self) -> int:
        """Bytes that nobody reads after this op."""
        return sum(self.frees)


@dataclass(frozen=True)
class Step:
    """One training step of one rank: forward and backward, in program order.

    Works that stand for the same equal layers (``copies`` > 1) follow each other; :meth:`unrolled` repeats them.

    Attributes:
        works: the ops.
        rank: whose step it is.
        world_size: the number of ranks.
        parameters: bytes of parameters and buffers that the rank keeps.
        gradients: bytes of parameter gradients that the rank keeps after the step.
        inputs: bytes of the inputs.
    """

    works: tuple[Work, ...]
    rank: int
    world_size: int
    parameters: int
    gradients: int
    inputs: int

    def unrolled(self) -> Iterator[Work]:
        """The ops as they run: what stands for several layers comes that often, one layer after the other."""
        for works in self.blocks():
            for _ in range(works[0].copies):
                yield from (replace(work, copies=1, run="") for work in works)

    def blocks(self) -> Iterator[list[Work]]:
        """Stretches of works of one direction that run once, or of one run of equal layers."""
        block: list[Work] = []
        for work in self.works:
            if block and (work.run, work.copies, work.direction) != (block[0].run, block[0].copies, block[0].direction):
                yield block
                block = []
            block.append(work)
        if block:
            yield block

    def of(self, direction: str | None = None) -> Iterable[Work]:
        """The works of one direction, or all."""
        return (work for work in self.works if direction in (None, work.direction))

    def flops(self, direction: str | None = None) -> int:
        """What the rank computes, 2 for each multiply-add."""
        return sum(work.flops * work.copies for work in self.of(direction))

    def messages(self, direction: str | None = None) -> int:
        """The number of messages: collectives, and hops of rings."""
        return sum(work.copies for work in self.of(direction) if work.kind == "message")

    def bytes_sent(self, direction: str | None = None) -> int:
        """What the rank sends to others."""
        return sum(w.message.bytes_sent * w.copies for w in self.of(direction) if w.kind == "message" and w.message)

    def live_bytes(self) -> Iterator[int]:
        """The most bytes held during each op of :meth:`unrolled`, before it frees any; parameters included."""
        live = self.parameters + self.inputs
        for work in self.unrolled():
            yield live + work.allocated + work.scratch
            live += work.allocated - work.freed

    def peak_bytes(self) -> int:
        """The most that the rank holds at a time, parameters, inputs and gradients included; no optimizer states."""
        return max(self.live_bytes(), default=self.parameters + self.inputs)
