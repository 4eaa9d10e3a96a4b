"""How long one op takes: formulas over numbers or sympy expressions, with the constants of a piece of hardware.

Every formula takes sizes as ints or as sympy expressions, and returns what it was given: seconds, or an expression of
them that ``sympy.lambdify`` and ``sympy.jscode`` take.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy

from sptransform.cost.hardware import Hardware
from sptransform.cost.records import Message, Work
from sptransform.diagnostics.errors import UsageError, describe

Number = Any  # an int, a float or a sympy expression

ATTENTION_SIZES = ("batch", "heads", "queries", "keys", "dim", "value_dim")
FLOPS_OF_PASSES = {"forward": (1, 1), "backward": (3, 2)}  # products over the dim of keys, and over that of values


def seconds(work: Work, hardware: Hardware) -> Number:
    """How long an op takes on its own; 0 for a wait, which :func:`simulate` knows the end of.

    Raises:
        UsageError: the hardware lacks a constant that the op's time depends on.
    """
    message = work.message if work.kind == "message" else None
    sizes = tuple(work.sizes.items())
    return _seconds(work.kind, pass_of(work), work.dtype, work.flops, work.traffic, sizes, message, hardware)


@lru_cache(maxsize=1 << 16)  # equal layers have equal works
def _seconds(
    kind: str,
    direction: str,
    dtype: str,
    flops: Number,
    traffic: Number,
    sizes: tuple[tuple[str, Number], ...],
    message: Message | None,
    hardware: Hardware,
) -> Number:
    if kind == "wait":
        return 0.0
    if message is not None:
        nodes = nodes_of(message.ranks, hardware)
        return message_seconds(message.kind, message.bytes_sent, len(message.ranks), nodes, hardware)
    if kind == "matmul":
        return matmul_seconds(flops, traffic, dtype, hardware)
    if kind == "attention":
        given = {name: size for name, size in sizes if name in ATTENTION_SIZES}
        return attention_seconds(flops, traffic, direction, dtype, hardware, **given)
    return memory_seconds(traffic, hardware)


def pass_of(work: Work) -> str:
    """Which pass a kernel of attention is; one that the backward computes again is "forward" all the same."""
    return "backward" if "backward" in work.op else "forward"


def memory_seconds(traffic: Number, hardware: Hardware) -> Number:
    """Reading and writing ``traffic`` bytes of device memory, in one kernel."""
    return at_least(hardware["launch.seconds"], _moving(traffic, hardware))


def matmul_seconds(flops: Number, traffic: Number, dtype: str, hardware: Hardware) -> Number:
    """A product of matrices: bound by what it computes, by what it moves, or by starting it."""
    computing = flops / (peak_flops(dtype, hardware) * hardware["matmul.efficiency"])
    return at_least(hardware["launch.seconds"], computing, _moving(traffic, hardware))


def attention_seconds(
    flops: Number,
    traffic: Number,
    direction: str,
    dtype: str,
    hardware: Hardware,
    *,
    batch: Number,
    heads: Number,
    queries: Number,
    keys: Number,
    dim: Number,
    value_dim: Number,
) -> Number:
    """A fused kernel of attention, or of its gradient.

    A visible pair of a query and a key costs its products, at the kernel's rate, and its exponential. The forward takes
    blocks of queries over all keys, the backward blocks of keys over all queries (FlashAttention-2, arXiv 2307.08691,
    §3.2). Each row of such a block loses some time, at its start and end and where a mask cuts blocks, so that kernels
    run slower where the others are few. Fewer blocks than processors leave some idle.

    Args:
        flops: 2 for each multiply-add of a visible pair, in as many products as the pass has.
        traffic: bytes of the operands and results.
        direction: "forward", or "backward" for the gradient.
        dtype: as torch prints it, without "torch.".
        hardware: has the kernel's constants, as ``attention.KERNEL.DIRECTION``.
        batch: rows of the batch.
        heads: of queries.
        queries: rows of queries of one head.
        keys: rows of keys of one head.
        dim: of queries and keys.
        value_dim: of values.
    """
    kernel = f"attention.{hardware['attention.kernel']}.{direction}"
    over_keys, over_values = FLOPS_OF_PASSES[direction]
    flops_per_pair = 2 * (over_keys * dim + over_values * value_dim)
    pairs = flops / flops_per_pair
    own, others = (queries, keys) if direction == "forward" else (keys, queries)
    rows = batch * heads * own
    hidden = rows - pairs / at_least(1, others)
    paid = pairs + rows * hardware[f"{kernel}.lost_keys"] + hidden * hardware[f"{kernel}.masked_keys"]
    # in another dtype, products are as much slower as those of matmuls
    slower = peak_flops("bfloat16", hardware) / peak_flops(dtype, hardware)
    per_pair = flops_per_pair * slower / hardware[f"{kernel}.flops"] + hardware[f"{kernel}.seconds_per_score"]
    idle = at_least(1, hardware["processors"] * hardware["attention.tile"] / at_least(1, rows))
    return at_least(hardware["launch.seconds"], paid * per_pair * idle, _moving(traffic, hardware))


def message_seconds(kind: str, bytes_sent: Number, ranks: Number, nodes: Number, hardware: Hardware) -> Number:
    """A collective, or a hop to the neighbour that all ranks of a ring make at once.

    Args:
        kind: as in :class:`Message`.
        bytes_sent: what one rank sends to others.
        ranks: the number of ranks of the group.
        nodes: how many nodes they are on, equally many on each.
        hardware: its links inside a node, and between nodes.
    """
    if kind == "send_recv" or (kind == "all_to_all" and isinstance(ranks, int) and ranks == 2):
        return _by_nodes(nodes, *(_hop(bytes_sent, link, hardware) for link in _links(nodes, hardware)))
    if kind == "all_to_all":
        return _all_to_all(bytes_sent, ranks, nodes, hardware)
    return _ring_collective(kind, bytes_sent, ranks, nodes, hardware)


def nodes_of(ranks: Sequence[int], hardware: Hardware) -> int:
    """The number of nodes that these global ranks are on. Raises UsageError where there is no link between nodes."""
    return len({rank // hardware["node.ranks"] for rank in ranks})


def overlaps(message: Message, hardware: Hardware) -> bool:
    """Whether a message goes on beside kernels, rather than before the next one."""
    return bool(hardware[f"{link_of(message.ranks, hardware)}.overlaps"])


def link_of(ranks: Sequence[int], hardware: Hardware) -> str:
    """The slowest link of a message among these global ranks: "between" nodes, or "inside" one."""
    return "between" if nodes_of(ranks, hardware) > 1 else "inside"


def peak_flops(dtype: str, hardware: Hardware) -> float:
    """FLOP/s of products in ``dtype``; of one without a number of its own, those of its width."""
    found = hardware.get(f"peak_flops.{dtype}")
    if found is None and dtype.startswith("float8"):
        found = hardware.get("peak_flops.float8")
    if found is not None:
        return float(found)
    return float(hardware["peak_flops.bfloat16" if dtype in ("", "int8", "uint8", "bool") else "peak_flops.float32"])


def at_least(*bounds: Number) -> Number:
    """The largest of these: what is bound by several things takes as long as the slowest of them."""
    if all(isinstance(bound, int | float) for bound in bounds):
        return max(bounds)
    return sympy.Max(*bounds)


def _moving(traffic: Number, hardware: Hardware) -> Number:
    return traffic / (hardware["memory.bandwidth"] * hardware["memory.efficiency"])


def _links(nodes: Number, hardware: Hardware) -> tuple[str, ...]:
    """The links that may be read for a group on ``nodes`` nodes: inside one, and between them if it may leave one."""
    if isinstance(nodes, int) and nodes == 1:
        return ("inside",)
    if "between.bandwidth" in hardware.constants:
        return ("inside", "between")
    if not isinstance(nodes, int):
        return ("inside",)
    raise UsageError(
        describe(
            f"hardware {hardware.name} has no links between nodes",
            found=f"ranks on {nodes} nodes of {hardware['node.ranks']}",
            fix="hardware that has, such as h100-ib; fewer ranks; or `sptransform calibrate --ranks` with as many",
        )
    )


def _by_nodes(nodes: Number, inside: Number, between: Number = None) -> Number:
    if between is None:
        return inside
    if isinstance(nodes, int):
        return inside if nodes == 1 else between
    return sympy.Piecewise((inside, nodes <= 1), (between, True))


def _hop(size: Number, link: str, hardware: Hardware) -> Number:
    """One message to a neighbour. Below some size a protocol of lower latency and bandwidth is used."""
    limit = hardware[f"{link}.small.bytes"]
    small = hardware[f"{link}.small.latency"] + size / hardware[f"{link}.small.bandwidth"]
    large = hardware[f"{link}.latency"] + size / hardware[f"{link}.bandwidth"]
    if isinstance(size, int | float):
        return small if size < limit else large
    return sympy.Piecewise((small, size < limit), (large, True))


def _ring_collective(kind: str, size: Number, ranks: Number, nodes: Number, hardware: Hardware) -> Number:
    """Ranks pass parts round: each hop has a latency, and nodes of several ranks have as many cards between them."""
    latency, bandwidth = hardware["inside.collective.latency_per_rank"], hardware[f"inside.{kind}.bandwidth"]
    inside = ranks * latency + size / bandwidth
    if len(_links(nodes, hardware)) == 1:
        return inside
    hops = nodes * hardware["between.collective.latency_per_rank"] + (ranks - nodes) * latency
    cards = ranks / nodes * hardware["between.collective.bandwidth"]
    return _by_nodes(nodes, inside, hops + at_least(size / bandwidth, size / cards))


def _all_to_all(size: Number, ranks: Number, nodes: Number, hardware: Hardware) -> Number:
    """Each rank sends to all others at once, over a link of its own or one that they share."""
    bandwidth = hardware["inside.all_to_all.bandwidth"]
    if hardware["inside.shared"]:
        bandwidth = bandwidth / at_least(1, ranks - 1)
    inside = hardware["inside.all_to_all.latency"] + size / bandwidth
    if len(_links(nodes, hardware)) == 1:
        return inside
    near = (ranks / nodes - 1) / at_least(1, ranks - 1)  # the share that stays in the node
    card = hardware["between.collective.bandwidth"] * (1 - hardware["between.all_to_all.lost"] / nodes)
    latency = hardware["between.all_to_all.latency"] + nodes * hardware["between.all_to_all.latency_per_node"]
    return _by_nodes(nodes, inside, latency + at_least(size * near / bandwidth, size * (1 - near) / card))
