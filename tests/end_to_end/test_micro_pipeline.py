"""Inductor's micro-pipelined tensor parallelism knows our collectives, and the matmuls next to them.

What it would make one op of is asked of torch itself, of the graphs that Inductor's post-grad passes leave. The pass is
private (``torch._inductor.fx_passes.micro_pipeline_tp``), and nothing else knows what it recognises: if torch renames
its functions, this test is to follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import micro_pipeline_tp, post_grad
from torch.nn.functional import linear
from torch.testing._internal.distributed.fake_pg import FakeStore

import sptransform.ops  # noqa: F401 - registers the ops

NUM_RANKS = 4
sp, aten, c10d = torch.ops.sptransform, torch.ops.aten, torch.ops._c10d_functional
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    dist.destroy_process_group()


@dataclass
class Seen:
    """Of each graph, forward and backward: its collectives and copies, and what torch's pass finds in it."""

    num_gathers: list[int] = field(default_factory=list)
    num_scatters: list[int] = field(default_factory=list)
    gathers: list[list[Any]] = field(default_factory=list)
    scatters: list[list[Any]] = field(default_factory=list)
    num_copies: list[int] = field(default_factory=list)

    def look(self, graph: fx.Graph) -> None:
        def count(*targets: Any) -> int:
            return sum(node.target in targets for node in graph.nodes)

        self.num_gathers.append(count(c10d.all_gather_into_tensor.default))
        self.num_scatters.append(count(c10d.reduce_scatter_tensor.default))
        self.num_copies.append(count(aten.cat.default, aten.clone.default, aten._to_copy.default))
        self.gathers.append(micro_pipeline_tp.find_all_gather_patterns(graph))
        self.scatters.append(micro_pipeline_tp.find_reduce_scatter_patterns(graph))


def compiled(fn: Callable[..., Tensor], *inputs: Tensor, pipelined: bool, dynamic: bool) -> Seen:
    """Compile ``fn`` and its backward as Inductor does, up to where it would generate code."""
    seen = Seen()

    def stop_there(gm: fx.GraphModule, _: Any, **options: Any) -> Callable[..., Any]:
        post_grad.view_to_reshape(gm)
        post_grad.post_grad_passes(gm, is_inference=False)
        seen.look(gm.graph)
        return make_boxed_func(gm.forward)

    with config.patch(_micro_pipeline_tp=pipelined):
        run = torch.compile(
            fn, backend=lambda gm, xs: compile_fx(gm, xs, inner_compile=stop_there), dynamic=dynamic or None
        )
        if dynamic:
            torch._dynamo.mark_dynamic(inputs[0], 1)
        run(*inputs).sum().backward()
    return seen


def mlp(x: Tensor, *weights: Tensor, spec: str) -> Tensor:
    """Column-parallel linears of the gathered sequence, a row-parallel one of their product."""
    *up, down = weights
    group = dist.group.WORLD.group_name
    y = sp.all_gather(x, spec, group, False)
    h = torch.nn.functional.silu(linear(y, up[0]))
    for weight in up[1:]:
        h = h * linear(y, weight)
    return sp.reduce_scatter(linear(h, down), spec, group)


def seen_in(num_sequences: int, num_linears: int, *, pipelined: bool = True, dynamic: bool = False) -> Seen:
    spec = "S(1:?/4)" if dynamic else "S(1:64/4)"
    x = torch.randn(num_sequences, 16, 32, requires_grad=True)
    weights = [torch.randn(8, 32, requires_grad=True) for _ in range(num_linears)]
    down = torch.randn(32, 8, requires_grad=True)
    return compiled(lambda *xs: mlp(*xs, spec=spec), x, *weights, down, pipelined=pipelined, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "open length"])
@pytest.mark.parametrize("num_linears", [1, 2])
@pytest.mark.parametrize("num_sequences", [1, 2])
def test_every_collective_and_its_matmuls_are_found(num_sequences: int, num_linears: int, dynamic: bool) -> None:
    seen = seen_in(num_sequences, num_linears, dynamic=dynamic)
    assert seen.num_gathers == seen.num_scatters == [1, 1]
    (forward_gather,), (backward_gather,) = seen.gathers
    (forward_scatter,), (backward_scatter,) = seen.scatters
    assert [match.gather_dim for match in (forward_gather, backward_gather)] == [1, 1]
    assert [match.scatter_dim for match in (forward_scatter, backward_scatter)] == [1, 1]
    assert len(micro_pipeline_tp._find_consumer_matmuls(forward_gather.res_node)) == num_linears
    assert len(micro_pipeline_tp._find_consumer_matmuls(backward_gather.res_node)) == 1
    assert micro_pipeline_tp._find_producer_matmul(forward_scatter.input_node) is not None
    if num_linears == 1:
        assert micro_pipeline_tp._find_producer_matmul(backward_scatter.input_node) is not None
    else:  # the gradient is a sum of two matmuls, whoever emits the collective
        assert backward_scatter.input_node.target == aten.add.Tensor


@pytest.mark.parametrize(
    ("num_sequences", "pipelined", "num_copies"),
    [
        (1, False, [0, 0]),
        (2, False, [2, 2]),  # one a collective
        (1, True, [2, 2]),  # which are in the ops that the pass makes
    ],
)
def test_copies(num_sequences: int, pipelined: bool, num_copies: list[int]) -> None:
    assert seen_in(num_sequences, 2, pipelined=pipelined).num_copies == num_copies
