"""Writes docs/which_when.md: `python docs/which_when.py`. Every number on it is counted from rewritten graphs.

Two models, on `meta`: a small one, whose numbers can be checked by hand, and one of the shape of Llama 3 8B.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from large_model import inputs, llama_8b
from torch import Tensor, nn
from torch.nn import functional

import sptransform
from sptransform import AllGatherKV, Comparison, MegatronSP, Ring, Ulysses
from sptransform.inspection.attended_work import imbalance
from sptransform.planning.records import Option
from sptransform.planning.units import quantity, size

PAGE = Path(__file__).with_name("which_when.md")

SMALL = {"width": 64, "heads": 8, "key_heads": 4, "hidden": 256, "depth": 3}
SMALL_RANKS, SMALL_BATCH, SMALL_TOKENS = 4, 4, 512
LARGE_RANKS, LARGE_TOKENS = 8, 131_072
KINDS = {
    "all_gather": "all-gather",
    "all_reduce": "all-reduce",
    "all_to_all": "all-to-all",
    "reduce_scatter": "reduce-scatter",
    "send_recv": "hop",
}


@dataclass(frozen=True)
class Scheme:
    """A way to split attention, in words. ``small`` and ``large``: the names of its options in the comparisons."""

    title: str
    small: str
    large: str
    mechanism: str
    tensor_parallelism: str
    strengths: str
    limits: str
    take: str


SCHEMES = (
    Scheme(
        "Ring attention",
        "ring",
        "ring",
        "A rank keeps its queries. Keys and values go round the ranks, one hop at a time; each arriving block is "
        "attended "
        "while the next one travels, and the results are merged by their log-sum-exp. In the backward the keys go "
        "round "
        "again, with their gradients.",
        'None: it uses no head, so heads are free for tensor parallelism on another mesh dim, `("ring", "megatron")`.',
        "Any number of ranks and heads. Memory for two blocks of keys and values. Hops hide behind attention once a "
        "rank "
        "has enough tokens.",
        "As many hops as other ranks, each of which waits for a host on short sequences. Smaller blocks run slower. "
        "Causal "
        "masks need the zigzag layout, packed documents the striped one.",
        "long sequences on many ranks, more ranks than key heads, slow links between nodes",
    ),
    Scheme(
        "Ulysses, by heads",
        "ulysses",
        "ulysses",
        "One all-to-all turns shards of the sequence into shards of the heads, for queries, keys and values in one "
        "message; "
        "attention runs on whole sequences; a second all-to-all turns its output back.",
        "Both divide the heads: Ulysses ranks times tensor-parallel ranks must divide the heads.",
        "The fewest messages, and bytes that shrink with N. Attention is the usual kernel. Balanced under any mask.",
        "More ranks than heads leave ranks idle in attention; key heads that ranks share are sent to each of them.",
        "N that divides the key heads, N above the query heads for each key head, fast links",
    ),
    Scheme(
        "Ulysses, by batch",
        "Ulysses(split='batch')",
        "Ulysses(split='batch')",
        "The same two all-to-alls, which divide the rows of the batch instead of the heads.",
        "None: heads are not used.",
        "Any number of heads.",
        "As many rows as ranks, or some ranks have none: then data parallelism is often simpler.",
        "several rows, heads that do not divide, activations that do not fit one rank's row outside of attention",
    ),
    Scheme(
        "USP, Ulysses x ring",
        "usp 2 x 2",
        "usp 4 x 2",
        "Ranks are a grid. All-to-alls among neighbours give each a part of the heads and a longer part of the "
        "sequence; "
        "rings among the groups pass the rest of the keys. Named as Ulysses x ring.",
        "The Ulysses dim divides heads, the ring does not.",
        "Fewer hops than a ring, more ranks than Ulysses has heads. Fits nodes: Ulysses inside, rings between.",
        'Messages of both. The grid has to be chosen; `USP()` takes the one that sends least, `"auto"` the fastest.',
        "more ranks than key heads, several nodes",
    ),
    Scheme(
        "All-gather of keys and values (Megatron context parallelism, Llama 3)",
        "allgather",
        "allgather",
        "A rank keeps its queries and gathers all keys and values of the layer; their gradients are reduce-scattered.",
        "None, as for a ring.",
        "One large message instead of many small ones; attention in one kernel, under any mask.",
        "Memory for all keys and values of a layer. The gather is not hidden behind the attention that needs it.",
        "few key heads, fast links, masks that a ring does not read, sequences too short for a ring",
    ),
    Scheme(
        "Megatron tensor and sequence parallelism",
        "megatron",
        "megatron",
        "Linears are cut along heads, hidden units and vocabulary. Between them activations are cut along the "
        "sequence: an "
        "all-gather before a column-parallel linear, a reduce-scatter after a row-parallel one.",
        "It is tensor parallelism: the sequence is cut over the same ranks as the weights.",
        "Weights, their gradients and optimizer states are divided too.",
        "Each rank sends about the width of all tokens for each layer, however many ranks there are. Ranks divide "
        "heads.",
        "weights that do not fit, inside of a node",
    ),
    Scheme(
        "Megatron context parallelism with tensor parallelism, ring",
        "ring 2 x megatron 2",
        "ring 4 x megatron 2",
        "Two mesh dims: a ring over parts of the sequence, and inside of each part tensor and sequence parallelism.",
        "Both, on dims of their own.",
        "Keys and values of few heads travel far, activations only near.",
        "Messages of both.",
        "weights that do not fit, and sequences that do not fit the ranks of one node",
    ),
    Scheme(
        "Megatron context parallelism with tensor parallelism, all-gather",
        "allgather 2 x megatron 2",
        "allgather 4 x megatron 2",
        "The same, with keys and values gathered over the first dim.",
        "Both, on dims of their own.",
        "As few messages as possible between nodes.",
        "Memory for the gathered keys and values, of the rank's own heads only.",
        "as above, with fast links between nodes or few key heads",
    ),
)


class Decoder(nn.Module):
    """The small model: layers of grouped-query attention and an MLP."""

    def __init__(self, width: int, heads: int, key_heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, key_heads, hidden) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().pow(2).mean()


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int, hidden: int) -> None:
        super().__init__()
        self.dim = width // heads
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, key_heads * self.dim, bias=False) for _ in range(2))
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(x)))


def small() -> Comparison:
    with torch.device("meta"):
        model = Decoder(**SMALL).bfloat16()
        x = torch.empty(SMALL_BATCH, SMALL_TOKENS, SMALL["width"], dtype=torch.bfloat16)
    return compared(model, (x,), SMALL_RANKS, grad_sync=False)


def large() -> Comparison:
    return compared(llama_8b(), inputs(LARGE_TOKENS, 1), LARGE_RANKS)


def compared(model: nn.Module, given: Any, num_ranks: int, **options: Any) -> Comparison:
    strategies = ["ulysses", Ulysses(split="batch"), "ring", "allgather", "usp", "megatron"]
    strategies += [(Ring(), MegatronSP()), (AllGatherKV(), MegatronSP())]
    return sptransform.compare(model, given, world_size=num_ranks, strategies=strategies, outputs="loss", **options)


# ---------------------------------------------------------------------------------------------------------------
# What a page says.


def page() -> str:
    of_small = {option.name: option for option in small().options}
    found = large()
    of_large = {option.name: option for option in found.options}
    parts = [
        "<!-- Written by docs/which_when.py, which counts every number. -->",
        "# Schemes side by side",
        "Each scheme of sequence parallelism, by what one rank does in it. Nothing here is measured or estimated: "
        "every "
        "number is counted from the graph that the scheme makes of a model, forward and, by AOTAutograd, backward. "
        "`python docs/which_when.py` counts again. For your model, [`compare`](explain.md#strategies-side-by-side) "
        "does.",
        "Two models:",
        f"- **small**: {SMALL['depth']} layers of width {SMALL['width']}, {SMALL['heads']} heads, "
        f"{SMALL['key_heads']} key "
        f"heads, an MLP of {SMALL['hidden']}; {SMALL_BATCH} rows of {SMALL_TOKENS} tokens, causal, {SMALL_RANKS} "
        f"ranks. "
        "The numbers of its middle layer are shown, without gradients of parameters.\n"
        f"- **8B**: the shape of Llama 3 8B, 32 layers, one row of {LARGE_TOKENS:,} tokens, {LARGE_RANKS} ranks. The "
        'numbers are of a whole step that returns the loss (`outputs="loss"`), gradients of parameters included.',
        "## The 8B model",
        table(
            ("scheme", "sent forward", "backward", "messages", "FLOPs of a rank", "over the mean", "peak memory"),
            (large_row(scheme, of_large[scheme.large]) for scheme in SCHEMES),
        ),
        "Over the mean: the attention of the busiest rank. Peak memory: parameters, gradients and activations, without "
        "optimizer states and without checkpointing. One rank alone would compute "
        f"{quantity(found.one_device.flops())} FLOPs and hold {size(found.one_device.peak_bytes())}.",
        "Of these bytes, gradients of replicated parameters are the same for all but Megatron's, which keep fewer.",
        *(section(scheme, of_small[scheme.small], of_large[scheme.large]) for scheme in SCHEMES),
    ]
    return "\n\n".join(parts) + "\n"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def large_row(scheme: Scheme, option: Option) -> list[str]:
    named = f"[{scheme.title}](#{anchor(scheme.title)}), {option.name}" if "usp" in option.name else None
    title = named or f"[{scheme.title}](#{anchor(scheme.title)})"
    step = option.step
    if step is None:
        return [title, "cannot run it", "", "", "", "", ""]
    return [
        title,
        size(step.bytes_sent("forward")),
        size(step.bytes_sent("backward")),
        f"{step.messages('forward'):,} + {step.messages('backward'):,}",
        quantity(step.flops()),
        f"{imbalance(option.pairs):+.1%}",
        size(option.peak_bytes),
    ]


def anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def section(scheme: Scheme, of_small: Option, of_large: Option) -> str:
    rows = [
        ("Primitives in a layer, forward", primitives(of_small, "forward")),
        ("backward", primitives(of_small, "backward")),
        ("Bytes in a layer, forward", f"{bytes_in_layer(of_small, 'forward'):,}"),
        ("backward", f"{bytes_in_layer(of_small, 'backward'):,}"),
        ("Balance under the causal mask", f"{imbalance(of_small.pairs):+.1%} on the busiest rank"),
        ("Memory at its peak", f"{size(of_small.peak_bytes)}, 8B: {size(of_large.peak_bytes)}")
        if of_large.step
        else ("Memory at its peak", size(of_small.peak_bytes)),
        ("Beside tensor parallelism", scheme.tensor_parallelism),
        ("Strengths", scheme.strengths),
        ("Limits", scheme.limits),
        ("Take it for", scheme.take),
    ]
    parts = [f"## {scheme.title}", scheme.mechanism, table(("", f"`{of_small.strategy}`, small"), rows)]
    if of_large.blocked:
        what, *_ = of_large.blocked.splitlines()
        parts.append(f'The 8B model, of one row, cannot take it: "{what}".')
    return "\n\n".join(parts)


def primitives(option: Option, direction: str) -> str:
    """The messages of the middle layer, by kind."""
    kinds = Counter(
        KINDS["send_recv" if work.ring else work.message.kind]
        for work in option.step.of(direction)
        if work.kind == "message" and in_middle(work.layer)
    )
    return ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in sorted(kinds.items())) or "none"


def bytes_in_layer(option: Option, direction: str) -> int:
    return sum(
        work.message.bytes_sent
        for work in option.step.of(direction)
        if work.kind == "message" and in_middle(work.layer)
    )


def in_middle(layer: str) -> bool:
    return re.match(r"layers\.1(\.|$)", layer) is not None


if __name__ == "__main__":
    PAGE.write_text(page())
