"""Masks as users write them, with what is to be read in each, and how the two are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

# Private: as the library traces with the symbols of Dynamo's sizes.
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatefulSymbolicContext
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sptransform.capture.capture import capture
from sptransform.engine.pass_manager import run_passes
from sptransform.graph import dataflow
from sptransform.ops.mask_program import block_mask
from sptransform.passes import PIPELINE
from sptransform.passes.normalize.attend_by_position import AttendByPosition
from sptransform.sharding.sizes import split_length
from sptransform.strategies.ring import Ring
from tests.support.graphs import a_context, nodes_of, run_once

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 6, 4
PASSES = tuple(PIPELINE)[: [type(step) for step in PIPELINE].index(AttendByPosition) + 1]
RING = torch.ops.sptransform.ring_attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default
Mask = Callable[..., Tensor]


def attend(mask: Mask | None, *inputs: Tensor, **options: Any) -> Tensor:
    query, key, value, *rest = inputs
    return functional.scaled_dot_product_attention(query, key, value, mask(*rest) if mask else None, **options)


def heads(heads: int = HEADS, length: int = LENGTH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, heads, length, WIDTH, dtype=dtype, requires_grad=True)


def traced(model: Callable[..., Any], inputs: list[Any]) -> fx.GraphModule:
    """The model captured without Dynamo, which would take most of the time here."""
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    graph.output((graph.call_function(model, tuple(placeholders)),))
    return capture(fx.GraphModule({}, graph), inputs)


class _Arguments(fx.Interpreter):
    """Runs a graph up to its attention, and keeps what that is called with."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (RING, SDPA):
            self.found = args, kwargs
        return super().call_function(target, args, kwargs)


@dataclass(frozen=True)
class Read:
    """One attention before and after the pass."""

    before: fx.GraphModule
    gm: fx.GraphModule
    inputs: list[Tensor]

    @property
    def node(self) -> fx.Node:
        (node,) = nodes_of(self.gm, RING)
        return node

    @property
    def band(self) -> tuple[int | None, int | None]:
        return self.node.kwargs.get("nearest"), self.node.kwargs.get("farthest")

    @property
    def program(self) -> str:
        return self.node.kwargs["mask"]

    @property
    def operands(self) -> list[list[fx.Node]]:
        """Rows, columns and tables."""
        return [*self.node.args[3:5], self.node.args[6] if len(self.node.args) > 6 else []]

    @property
    def squares(self) -> list[str]:
        """Nodes that have the dimensions of scores."""
        tensors = [node for node in self.gm.graph.nodes if dataflow.is_tensor(node)]
        return [node.name for node in tensors if dataflow.shape(node)[-2:] == (LENGTH, LENGTH)]

    def assert_same_mask(self) -> None:
        """What is added to scores, from band and program, is what is added by the mask."""
        runs = []
        for gm in (self.before, self.gm):
            runs.append(_Arguments(gm))
            runs[-1].run(*self.inputs)
        args, kwargs = runs[1].found
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        nearest, farthest = self.band
        hidden = (distance < (-LENGTH if nearest is None else nearest)) | (
            distance > (LENGTH if farthest is None else farthest)
        )
        found = torch.zeros((), dtype=torch.float64)
        if kwargs["mask"]:
            found = added(block_mask(kwargs["mask"], *args[3:5], 0, LENGTH, slice(0, LENGTH), *args[6:]))
        found = found.expand(BATCH, HEADS, LENGTH, LENGTH).masked_fill(hidden, -math.inf)
        stated = added(runs[0].found[0][3]).expand_as(found)
        # where a query sees a key, the lowest number hides as -inf does
        stated = stated.masked_fill((stated == LOWEST) & (stated == 0).any(-1, keepdim=True) & hidden, -math.inf)
        torch.testing.assert_close(found, stated, rtol=0.0, atol=0.0)

    def assert_same_attention(self) -> None:
        # not fused: the backward of torch's CPU kernel is wrong for a row of scores that are all the lowest number
        with sdpa_kernel(SDPBackend.MATH):
            reference = run_once(self.before, self.inputs)
        found = run_once(self.gm, self.inputs)
        torch.testing.assert_close(found.outputs, reference.outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.grads, reference.grads, rtol=1e-12, atol=1e-12)


def added(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    return mask.double()


def read(mask: Mask | None, *inputs: Tensor, **options: Any) -> Read:
    torch.manual_seed(0)
    all_inputs = [heads(), heads(), heads(), *inputs]

    def model(*inputs: Tensor) -> Tensor:
        return attend(mask, *inputs, **options)

    gm = run_passes(traced(model, all_inputs), PASSES, a_context(strategy=Ring()))
    return Read(traced(model, all_inputs), gm, all_inputs)


_size: list[Any] = [LENGTH]


def size() -> Any:
    """The number of queries and keys; a SymInt where it is open."""
    return _size[-1]


@contextmanager
def of_size(new: Any) -> Iterator[None]:
    """Masks of another size."""
    _size.append(new)
    try:
        yield
    finally:
        _size.pop()


def queries() -> Tensor:
    return torch.arange(size())[:, None]


def keys() -> Tensor:
    return torch.arange(size())[None]


def causal() -> Tensor:
    return keys() <= queries()


def ones(dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(size(), size(), dtype=dtype)


def zeros() -> Tensor:
    return torch.zeros(size(), size(), dtype=torch.float64)


def hide(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, torch.tensor(-math.inf, dtype=torch.float64))


def of_counted_tokens() -> Tensor:
    """Positions as a module makes them from what the user passes, of whose shape only they depend."""
    positions = torch.ones_like(torch.zeros(BATCH, size(), dtype=torch.long)).cumsum(-1) - 1
    return (positions[:, None, None] <= positions[:, None, :, None])[:, :, :, : size()]


def open_graph(model: Callable[..., Tensor], inputs: list[Tensor]) -> fx.GraphModule:
    """The graph of a model in whose inputs every dimension of ``LENGTH`` has one open size; that size comes first."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = TracingContext(mode)
    for i, x in enumerate(inputs):
        sizes = [DimDynamic.DUCK if n == LENGTH else DimDynamic.STATIC for n in x.shape]
        context.tensor_to_context[x] = StatefulSymbolicContext(sizes, tensor_source=ConstantSource(f"x{i}"))
    symbols = context.tensor_to_context[inputs[0]]
    length = mode.from_tensor(inputs[0], symbolic_context=symbols, source=symbols.tensor_source).shape[2]
    split_length(length, 2)

    def sized(length: Any, *inputs: Tensor) -> Tensor:
        with of_size(length):
            return model(*inputs)

    graph = fx.Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(len(inputs) + 1)]
    graph.output((graph.call_function(sized, tuple(placeholders)),))
    with tracing(context):
        return capture(fx.GraphModule({}, graph), [length, *inputs])


BANDS: dict[str, tuple[Mask, tuple[int | None, int | None]]] = {
    "key <= query": (causal, (0, None)),
    "query >= key": (lambda: queries() >= keys(), (0, None)),
    "key < query": (lambda: keys() < queries(), (1, None)),
    "not key > query": (lambda: ~(keys() > queries()), (0, None)),
    "diagonal": (lambda: keys() == queries(), (0, 0)),
    "window": (lambda: causal() & (queries() - keys() < 3), (0, 2)),
    "window by shifted keys": (lambda: (keys() > queries() - 3) & causal(), (0, 2)),
    "two sides": (lambda: (queries() - keys()).abs() <= 2, (-2, 2)),
    "keys ahead only": (lambda: (keys() - queries()).clamp(-3, 3) >= 1, (None, -1)),
    "offsets": (lambda: queries() + 10 >= keys() + 8, (-2, None)),
    "from the end": (lambda: -keys() >= -queries(), (0, None)),
    "sum": (lambda: queries() + (5 - keys()) > 5, (1, None)),
    "floating point": (lambda: queries().float() - keys().double() > -0.5, (0, None)),
    "expanded before": (lambda: queries().expand(size(), size()) - 2 < keys().expand(1, size(), size()), (None, 1)),
    "tril": (lambda: ones().tril(), (0, None)),
    "tril of numbers": (lambda: ones(torch.float32).tril(1).bool(), (-1, None)),
    "triu of -inf": (lambda: torch.full((size(), size()), -math.inf, dtype=torch.float64).triu(1), (0, None)),
    "tril and triu": (lambda: ones().tril(1) & ones().triu(-2), (-1, 2)),
    "not tril": (lambda: ~ones().tril(-1), (None, 0)),
    "where": (lambda: hide(causal()), (0, None)),
    "where, the other way": (lambda: torch.where(keys() > queries(), -math.inf, zeros()), (0, None)),
    "masked_fill": (lambda: zeros().masked_fill(~causal(), -math.inf), (0, None)),
    "log": (lambda: causal().double().log(), (0, None)),
    "sum of -inf": (lambda: hide(causal()) + hide(queries() - keys() < 3), (0, 2)),
    "not or": (lambda: ~((keys() > queries()) | (queries() - keys() > 3)), (0, 3)),
    "nested": (lambda: causal() & ~(~(queries() - keys() < 4) | (queries() - keys() > 2)), (0, 2)),
    "exclusive or": (lambda: (keys() > queries()) ^ torch.tensor(True), (0, None)),
    "numbers": (lambda: (causal().int() * (queries() - keys() < 3).int()) == 1, (0, 2)),
    "all": (lambda: ones() & torch.ones(BATCH, 1, 1, size(), dtype=torch.bool), (None, None)),
    "no padding": (lambda: causal() & torch.ones(BATCH, size())[:, None, None].bool(), (0, None)),
    "always within": (lambda: causal() & (queries() - keys() < 100), (0, None)),
    "batch and heads": (lambda: causal()[None, None].expand(BATCH, HEADS, size(), size()).contiguous(), (0, None)),
    "counted tokens": (of_counted_tokens, (0, None)),
    "transposed": (lambda: (queries() <= keys()).transpose(0, 1), (0, None)),
    "viewed": (lambda: causal().view(1, 1, size(), size()).clone(), (0, None)),
    "lowest number where": (lambda: torch.where(causal(), zeros(), LOWEST), (0, None)),
    "a rounded zero": (lambda: -hide(causal()) * -1.0, (0, None)),
}


PADDING = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
BIAS = torch.randn(BATCH, 1, LENGTH, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LOWEST = torch.finfo(torch.float64).min


def alibi() -> Tensor:
    slopes = torch.pow(2.0, -torch.arange(1, HEADS + 1, dtype=torch.float64))
    return (keys() - queries()) * slopes[:, None, None]


def same_document(x: Tensor) -> Tensor:
    return x[:, None, :, None] == x[:, None, None]


def unmasked(padding: Tensor) -> Tensor:
    return padding[:, None, None].bool()


def old_style(padding: Tensor) -> Tensor:
    """Added to scores, with a number that hides no key from a query that sees nothing else."""
    upper = torch.full((size(), size()), LOWEST, dtype=torch.float64).triu(1)
    return upper[None, None].expand(BATCH, 1, -1, -1).masked_fill(padding[:, None, None] == 0, LOWEST)


# mask, its inputs, the band, how many rows and columns the program reads
PROGRAMS: dict[str, tuple[Mask, list[Tensor], tuple[int | None, int | None], tuple[int, int]]] = {
    "padding": (lambda x: causal() & unmasked(x), [PADDING], (0, None), (0, 1)),
    "padding under not or": (lambda x: ~((keys() > queries()) | ~unmasked(x)), [PADDING], (0, None), (0, 1)),
    "padding of queries": (lambda x: causal() & x[:, None, :, None].bool(), [PADDING], (0, None), (1, 0)),
    "padding added": (lambda x: hide(causal()) + hide(unmasked(x)), [PADDING], (0, None), (0, 1)),
    "documents": (lambda x: causal() & same_document(x), [DOCUMENTS], (0, None), (1, 1)),
    "documents by where": (
        lambda x: torch.where(causal() & same_document(x), x[:, None, None].double(), zeros() - math.inf),
        [DOCUMENTS],
        (0, None),
        (1, 2),
    ),
    "positions of the user": (
        lambda x: x[:, None, None] <= x[:, None, :, None],
        [POSITIONS],
        (None, None),
        (1, 1),
    ),
    "documents in three dimensions": (
        lambda x: (x[:, :, None] == x[:, None]).unsqueeze(1) & causal(),
        [DOCUMENTS],
        (0, None),
        (1, 1),
    ),
    "transposed": (
        lambda x: (x[:, None] <= x[:, :, None]).transpose(1, 2).view(BATCH, 1, size(), size()),
        [DOCUMENTS],
        (None, None),
        (1, 1),
    ),
    "heads first": (
        lambda x: (
            (x[:, None, :, None] == x[:, None, None]).expand(-1, HEADS, -1, -1).permute(1, 0, 3, 2).transpose(0, 1)
        ),
        [DOCUMENTS],
        (None, None),
        (1, 1),
    ),
    "or a prefix": (lambda: causal() | (keys() < 3), [], (None, None), (1, 2)),
    "or documents": (lambda x: causal() | same_document(x), [DOCUMENTS], (None, None), (2, 2)),
    "clamped positions": (lambda: queries().clamp(max=3) >= keys(), [], (None, None), (1, 1)),
    "halved positions": (lambda: queries() // 2 >= keys() // 2, [], (None, None), (1, 1)),
    "doubled difference": (lambda: torch.sub(queries(), keys(), alpha=2) >= 0, [], (None, None), (1, 1)),
    "sum of positions": (lambda: queries() + keys() < 7, [], (None, None), (1, 1)),
    "every other": (lambda: causal() & ((queries() - keys()) % 2 == 0), [], (0, None), (1, 1)),
    "not the diagonal": (lambda: queries() != keys(), [], (None, None), (1, 1)),
    "nothing is visible": (lambda: queries() - keys() > 100, [], (None, None), (1, 1)),
    "a window the user chooses": (lambda x: causal() & (queries() - keys() < x), [torch.tensor(3)], (0, None), (1, 2)),
    "rounded positions": (
        lambda: (queries() + 1000).bfloat16() >= (keys() + 1000).bfloat16(),
        [],
        (None, None),
        (1, 1),
    ),
    "numbers of the padding": (
        lambda x: (causal().long() + x[:, None, None]) == 2,
        [PADDING],
        (None, None),
        (1, 2),
    ),
    "bias by distance": (alibi, [], (None, None), (1, 2)),
    "bias and causal": (lambda: alibi() + hide(causal()), [], (0, None), (1, 2)),
    "bias under causal": (lambda: alibi().masked_fill(~causal(), -math.inf), [], (0, None), (1, 2)),
    "bias where causal": (lambda: torch.where(causal(), alibi(), -math.inf), [], (0, None), (1, 2)),
    "bias, causal and padding": (
        lambda x: (alibi() + hide(unmasked(x))).masked_fill(~causal(), -math.inf),
        [PADDING],
        (0, None),
        (1, 3),
    ),
    "bias in another dtype": (
        lambda: (alibi().float() + hide(causal()).float()).double(),
        [],
        (0, None),
        (1, 2),
    ),
    "lowest number": (old_style, [PADDING], (None, None), (1, 3)),
    "lowest number where rows see nothing": (
        lambda: torch.where(keys() < queries(), zeros(), LOWEST),
        [],
        (None, None),
        (1, 2),
    ),
    "lowest number twice": (
        lambda: (
            torch.where(causal(), zeros(), LOWEST / 2) + torch.where(queries() - keys() > 0, zeros(), LOWEST / 2)
        ),
        [],
        (None, None),
        (2, 4),
    ),
}

# these have an operand with both dimensions: masks that are inputs, or come from ops that are not understood
WHOLE: dict[str, tuple[Mask, list[Tensor], tuple[int | None, int | None]]] = {
    "an input": (lambda x: x, [BIAS > 0], (None, None)),
    "an input of two dimensions": (lambda x: x, [BIAS[0, 0] > 0], (None, None)),
    "an input of three dimensions": (lambda x: x.unsqueeze(1), [BIAS[:, 0] > 0], (None, None)),
    "a bias": (lambda x: x, [BIAS], (None, None)),
    "an input and causal": (lambda x: x & causal(), [BIAS > 0], (0, None)),
    "a bias and causal": (lambda x: x.masked_fill(~causal(), -math.inf), [BIAS], (0, None)),
    "a bias with tril": (lambda x: x.tril(), [BIAS], (None, None)),
    "an input, converted": (lambda x: x.bool() & causal(), [(BIAS > 0).long()], (0, None)),
    "concatenated": (lambda: torch.cat([ones()[:, :2], causal()[:, 2:]], 1), [], (None, None)),
    "counted": (lambda: ones(torch.long).cumsum(0) >= 3, [], (None, None)),
}


def learned(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def buckets() -> Tensor:
    """Of the distance, as T5 has them: some for each distance, some for ranges of them, by the sign."""
    signed = keys() - queries()
    distance = signed.abs()
    far = (2 + torch.log(distance.float() / 2) / math.log(2.0) * 2).long()
    far = torch.min(far, torch.full_like(far, 3))
    return (signed > 0).long() * 4 + torch.where(distance < 2, distance, far)


def by_distance(reach: int = 3) -> Tensor:
    return (keys() - queries()).clamp(-reach, reach)


_LOOKED_UP = "%3 = sub.Tensor(%1, %0); %4 = clamp(%3, -3, 3); %5 = add.Tensor(%4, 3); %6 = lookup(%2, %5)"

# masks with gradients: mask, its inputs, the band, how many rows, columns and tables the program reads, the program
LEARNED: dict[str, tuple[Mask, list[Tensor], tuple[int | None, int | None], tuple[int, int, int], str | None]] = {
    "buckets of an embedding": (
        lambda w: functional.embedding(buckets(), w).permute(2, 0, 1).unsqueeze(0) + hide(causal()),
        [learned(8, HEADS)],
        (0, None),
        (1, 2, 1),
        "%4 = sub.Tensor(%1, %0); %5 = gt.Scalar(%4, 0); %6 = to.dtype(%5, int64); %7 = mul.Tensor(%6, 4); "
        "%8 = abs(%4); %9 = lt.Scalar(%8, 2); %10 = to.dtype(%8, float32); %11 = div.Tensor(%10, 2); %12 = log(%11); "
        "%13 = div.Tensor(%12, 0.6931471805599453); %14 = mul.Tensor(%13, 2); %15 = add.Tensor(%14, 2); "
        "%16 = to.dtype(%15, int64); %17 = min.other(%16, %2); %18 = where.self(%9, %8, %17); "
        "%19 = add.Tensor(%7, %18); %20 = lookup(%3, %19)",
    ),
    "heads last": (
        lambda w: w[by_distance() + 3].permute(2, 0, 1),
        [learned(7, HEADS)],
        (None, None),
        (1, 1, 1),
        _LOOKED_UP,
    ),
    "heads first": (lambda w: w[:, by_distance() + 3], [learned(HEADS, 7)], (None, None), (1, 1, 1), _LOOKED_UP),
    "a flat index": (
        lambda w: w[(by_distance() + 3).view(-1)].view(size(), size(), -1).permute(2, 0, 1).contiguous().unsqueeze(0),
        [learned(7, HEADS)],
        (None, None),
        (1, 1, 1),
        _LOOKED_UP,
    ),
    "a flat index, heads first": (
        lambda w: w[:, (by_distance() + 3).view(-1)].reshape(HEADS, size(), size()),
        [learned(HEADS, 7)],
        (None, None),
        (1, 1, 1),
        _LOOKED_UP,
    ),
    "all heads alike, from the end": (
        lambda w: w[by_distance()],
        [learned(7)],
        (None, None),
        (1, 1, 1),
        "%3 = sub.Tensor(%1, %0); %4 = clamp(%3, -3, 3); %5 = lookup(%2, %4)",
    ),
    "slopes": (
        lambda slopes: slopes[:, None, None] * (keys() - queries()) + hide(causal()),
        [learned(HEADS)],
        (0, None),
        (1, 2, 0),
        "%3 = sub.Tensor(%2, %0); %4 = mul.Tensor(%1, %3)",
    ),
    "a temperature for each query": (
        lambda t, w: w[by_distance() + 3] * t[:, None, :, None],
        [learned(BATCH, LENGTH), learned(7)],
        (None, None),
        (2, 1, 1),
        "%4 = sub.Tensor(%2, %0); %5 = clamp(%4, -3, 3); %6 = add.Tensor(%5, 3); %7 = lookup(%3, %6); "
        "%8 = mul.Tensor(%7, %1)",
    ),
    "forgetting": (  # Lin et al., arXiv 2503.02130
        lambda f: (f[:, :, :, None] - f[:, :, None]).masked_fill(~causal(), -math.inf),
        [learned(BATCH, HEADS, LENGTH)],
        (0, None),
        (1, 1, 0),
        "%2 = sub.Tensor(%0, %1)",
    ),
    "between documents": (
        lambda w, x: w[(x[:, :, None] - x[:, None]).abs()].permute(0, 3, 1, 2),
        [learned(3, HEADS), DOCUMENTS],
        (None, None),
        (1, 1, 1),
        "%3 = sub.Tensor(%0, %1); %4 = abs(%3); %5 = lookup(%2, %4)",
    ),
    "rows that see nothing else": (
        lambda w, x: w[by_distance() + 3].permute(2, 0, 1) + old_style(x),
        [learned(7, HEADS), PADDING],
        (None, None),
        (2, 4, 1),
        None,
    ),
    "rows that see nothing": (
        lambda w, x: w[:, by_distance() + 3] + hide(x[:, None, :, None].bool()),
        [learned(HEADS, 7), PADDING],
        (None, None),
        (2, 1, 1),
        None,
    ),
    "once detached": (
        lambda w: (bias := w[by_distance() + 3]) + 2 * bias.detach(),
        [learned(7)],
        (None, None),
        (1, 1, 2),
        None,
    ),
    "squashed": (
        lambda w: 4 * torch.sigmoid(w[:, by_distance() + 3]),
        [learned(HEADS, 7)],
        (None, None),
        (1, 1, 1),
        f"{_LOOKED_UP}; %7 = sigmoid(%6); %8 = mul.Tensor(%7, 4)",
    ),
}

# read, but with an operand of both dimensions
LEARNED_WHOLE: dict[str, tuple[Mask, list[Tensor]]] = {
    "a learned tensor": (lambda w: w, [learned(HEADS, LENGTH, LENGTH)]),
    "a padding index": (lambda w: functional.embedding(by_distance() + 3, w, 2).permute(2, 0, 1), [learned(7, HEADS)]),
    "scaled by frequency": (
        lambda w: functional.embedding(by_distance() + 3, w, scale_grad_by_freq=True).permute(2, 0, 1),
        [learned(7, HEADS)],
    ),
    "an index that is an input": (lambda w, i: w[:, i], [learned(HEADS, 3), torch.randint(3, (LENGTH, LENGTH))]),
    "two indices": (lambda w: w[by_distance() + 3, keys() * 0], [learned(7, 1)]),
    "by batch": (lambda w: w[by_distance() + 3].permute(2, 0, 1)[:, None], [learned(7, BATCH)]),
}
