"""What an explanation is made of, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sptransform.compiler.rewrite import Rewritten
from sptransform.engine.context import Fallback
from sptransform.engine.traffic import Collective
from sptransform.inspection.attended_work import Documents, imbalance


@dataclass(frozen=True)
class Redistribution:
    """One change of placement in the graph.

    Attributes:
        node: name of the graph's node.
        layer: path of the module it stands in.
        source_line: ``file:line: code`` of the user's op that reads the result; None for parameters.
        changes: (from, to) of every tensor moved, as printed.
        forward: the collective in the forward; None if nothing is sent.
        backward: the collective in the backward; None also if no gradient flows.
        again: the collective that repeats the forward in the backward, if the result is not saved.
        parameters: the parameters whose gradients its backward sums; empty for anything else.
    """

    node: str
    layer: str
    source_line: str | None
    changes: tuple[tuple[str, str], ...]
    forward: Collective | None
    backward: Collective | None
    again: Collective | None = None
    parameters: tuple[str, ...] = ()

    @property
    def change(self) -> str:
        """``S(2) -> S(1)``; several, if the tensors change differently."""
        return ", ".join(f"{source} -> {target}" for source, target in dict.fromkeys(self.changes))


@dataclass(frozen=True)
class RingPass:
    """An attention whose keys and values go round the ranks.

    Attributes:
        node, layer, source_line: as in :class:`Redistribution`.
        kernel: what computes one block.
        forward, backward: its messages; the backward is None if no gradient flows.
    """

    node: str
    layer: str
    source_line: str | None
    kernel: str
    forward: Collective | None
    backward: Collective | None


@dataclass(frozen=True)
class ExpandedRing:
    """What one rank does in a ring, one line per step: hops, waits, blocks, merges.

    Attributes:
        node, layer: as in :class:`RingPass`.
        forward, backward: the steps in each direction.
    """

    node: str
    layer: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]


@dataclass(frozen=True)
class Gathered:
    """A sharded tensor that is gathered because an op with a sharding rule needs the full tensor.

    Attributes:
        op, node: what reads it.
        source_line: of the reader.
        gathered_bytes: size of the full tensor, which every rank then holds.
    """

    op: str
    node: str
    source_line: str | None
    gathered_bytes: int


@dataclass(frozen=True)
class ChunkedLoss:
    """A loss whose logits exist for a chunk of tokens at a time, forward and, computed again, backward.

    Attributes:
        node, layer, source_line: as in :class:`Redistribution`.
        tokens, classes: of this rank; where their number is open, as printed.
        chunk: the tokens of a chunk.
        chunk_bytes: the size of a chunk's logits, in the dtype in which the loss is computed.
    """

    node: str
    layer: str
    source_line: str | None
    tokens: str
    classes: str
    chunk: int
    chunk_bytes: int | None


@dataclass(frozen=True)
class AttentionWork:
    """What every rank computes of one attention, in its forward, over all its heads and rows.

    Attributes:
        node, layer, source_line: as in :class:`Redistribution`.
        pairs: for every rank, how many pairs of a query and a key it attends.
        is_bound: whether a mask that depends on data may hide some of these pairs.
    """

    node: str
    layer: str
    source_line: str | None
    pairs: tuple[int, ...]
    is_bound: bool

    @property
    def imbalance(self) -> float:
        """By how much the busiest rank exceeds the mean: 0.1 is 10% more."""
        return imbalance(self.pairs)


@dataclass(frozen=True)
class Output:
    """A tensor the graph returns: its node, its placement, and its local type in the printer's form."""

    node: str
    placement: str
    type: str


@dataclass(frozen=True)
class Total:
    """All collectives of one kind in one direction."""

    direction: str
    kind: str
    count: int
    bytes_sent: int


@dataclass(frozen=True)
class Facts:
    """What one rank of ``world_size`` runs and sends in one training step.

    Attributes:
        strategy: the strategy object, printed.
        world_size: number of ranks; with one, nothing is inserted.
        rank: the rank whose bytes these are; ranks differ if a length or a number of heads does not divide.
        redistributions: every change of placement, in the graph's order.
        rings: every attention whose keys go round the ranks.
        collectives: everything a training step sends, in order: forward, then backward.
        fallbacks: ops that run replicated because they have no sharding rule.
        gathered: tensors gathered for an op that has a rule, in the graph's order, without returned tensors.
        outputs: the tensors the graph returns.
        grad_sync: whether parameter gradients are summed over the ranks.
        rewritten: the graph itself.
        expanded: with ``explain(..., expand=True)``, the steps of every ring.
        attention: the work of every rank in each attention that has a rule, in the graph's order.
        reason: why ``strategy="auto"`` took this strategy; empty if the user did.
        losses: the losses whose logits exist in chunks, in the graph's order.
        documents: with ``explain(..., documents=..)``, the lengths of packed documents by row, that it is counted for.
    """

    strategy: str
    world_size: int
    rank: int
    redistributions: tuple[Redistribution, ...]
    rings: tuple[RingPass, ...]
    collectives: tuple[Collective, ...]
    fallbacks: tuple[Fallback, ...]
    gathered: tuple[Gathered, ...]
    outputs: tuple[Output, ...]
    grad_sync: bool
    rewritten: Rewritten = field(repr=False, compare=False)
    expanded: tuple[ExpandedRing, ...] = ()
    attention: tuple[AttentionWork, ...] = ()
    documents: Documents | None = None
    losses: tuple[ChunkedLoss, ...] = ()
    reason: str = ""

    @property
    def attended_pairs(self) -> tuple[int, ...]:
        """For every rank, how many pairs of a query and a key it attends in the forward, in all attentions."""
        return tuple(map(sum, zip(*(work.pairs for work in self.attention), strict=True)))

    @property
    def totals(self) -> tuple[Total, ...]:
        """Messages and bytes by direction and kind, the forward first."""
        counts: Counter[tuple[str, str]] = Counter()
        sent: Counter[tuple[str, str]] = Counter()
        for collective in self.collectives:
            counts[collective.direction, collective.kind] += collective.count
            sent[collective.direction, collective.kind] += collective.bytes_sent
        keys = sorted(counts, key=lambda key: (key[0] != "forward", key[1]))
        return tuple(Total(*key, counts[key], sent[key]) for key in keys)

    def bytes_sent(self, direction: str | None = None) -> int:
        """Bytes this rank sends in one training step, or in one ``direction`` of it."""
        return sum(total.bytes_sent for total in self.totals if direction in (None, total.direction))

    @property
    def parameter_gradients(self) -> tuple[Redistribution, ...]:
        """The redistributions whose backward sums parameter gradients over the ranks, one per message."""
        return tuple(r for r in self.redistributions if r.parameters)
