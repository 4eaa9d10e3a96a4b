"""A step is counted as it runs: messages and bytes on gloo, FLOPs by torch's counter, and the most that is held."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import sptransform
from sptransform.compiler.rewrite import Rewritten
from sptransform.cost.op_costs import ATTENTION, attention_sizes
from sptransform.cost.read import step_of
from sptransform.ops.flops import attention_flops
from sptransform.testing.pretended import Asked, Runnable, on_pretended_ranks
from tests.support.collective_counts import RUN_NAMES, CountCollectives
from tests.support.gloo_pool import get_pool
from tests.support.models import build
from tests.support.rewritten import step_of_first_scalar

pytestmark = pytest.mark.timeout(280)

Counted = dict[tuple[str, str], tuple[int, int]]  # (direction, kind) -> messages, bytes


def build_llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Wide enough that tensors, not what the allocator and torch add to each, are what is held."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096)
    ids = torch.randint(512, (1, 2048))
    return LlamaForCausalLM(config).to(torch.bfloat16), {"input_ids": ids, "labels": ids, "use_cache": False}


def ran_and_held(rank: int, num_ranks: int, strategies: list[Any]) -> list[tuple[Counted, int]]:
    """What a worker does: messages and bytes of a step as they ran, and what is held at its peak."""
    found = []
    for strategy in strategies:
        torch._dynamo.reset()
        model, inputs = build_llama()
        sptransform.parallelize(model, strategy, backend="aot_eager", check_replicas="never")
        model(**inputs).loss.backward()  # compiles
        model.zero_grad()
        ran = count_messages(model, inputs)
        # the least of some: what a step returned may stay in a cycle until Python's collector comes by
        held = min(peak_of_step(model, inputs) for _ in range(3))
        found.append((ran, held))
    return found


def counted(strategy: Any, num_ranks: int, rank: int) -> tuple[Counted, int]:
    """The same, without running anything."""
    model, inputs = build_llama()
    step = step_of(sptransform.rewrite(model, strategy, inputs, world_size=num_ranks, rank=rank), fuse=False)
    messages: Counted = {}
    for work in step.works:
        if work.kind == "message":
            key = work.direction, work.message.kind
            number, sent = messages.get(key, (0, 0))
            messages[key] = number + 1, sent + work.message.bytes_sent
    return messages, step.peak_bytes() - step.parameters - step.inputs


def count_messages(model: torch.nn.Module, inputs: dict[str, Any]) -> Counted:
    with CountCollectives() as forward:
        loss = model(**inputs).loss
    with CountCollectives() as backward:
        loss.backward()
    messages: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for direction, ran in (("forward", forward), ("backward", backward)):
        for collective in ran.collectives:
            messages[direction, RUN_NAMES[collective.name]] += 1
            sent[direction, RUN_NAMES[collective.name]] += collective.sent_bytes
    return {key: (messages[key], sent[key]) for key in messages}


def peak_of_step(model: torch.nn.Module, inputs: dict[str, Any]) -> int:
    """The most bytes held during a step beyond those held before; every allocation on the CPU is seen."""
    model.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        output = model(**inputs)  # kept, as a loop of training does
        output.loss.backward()
    live = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "strategies"),
    [
        (2, ["ring", "ulysses"]),
        (2, ["allgather", "megatron"]),
        (4, ["ulysses", "ring", "allgather"]),
        (4, ["megatron", sptransform.USP(2, 2)]),
    ],
)
def test_a_step_is_counted_as_it_runs(num_ranks: int, strategies: list[Any]) -> None:
    for rank, of_rank in enumerate(get_pool(num_ranks).run(ran_and_held, strategies, timeout=250)):
        for strategy, (ran, held) in zip(strategies, of_rank, strict=True):
            messages, peak = counted(strategy, num_ranks, rank)
            assert messages == ran
            assert abs(peak - held) <= 0.05 * held, (peak, held)


def visible(op: Any) -> Any:
    """Torch's counter takes all pairs of queries and keys for computed; a step counts those that are seen."""

    class Node:
        target = op.default

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        sizes = attention_sizes(Node, args, kwargs)
        query = sizes["batch"], sizes["heads"], sizes["queries"], sizes["dim"]
        return attention_flops(query, (0, 0, 0, sizes["value_dim"]), sizes["pairs"], backward=ATTENTION[op])

    formula._get_raw = True
    return formula


@pytest.mark.parametrize(
    "strategy", ["ring", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ulysses", "allgather", "megatron"))]
)
def test_flops_are_those_of_torchs_counter(strategy: str) -> None:
    model, inputs = build("llama", layers=1)
    (ranks,) = on_pretended_ranks(model, inputs, [Asked(2, strategy)]).values()
    mapping = {op: visible(op) for op in ATTENTION if str(op).startswith("aten.")}

    def ran(graph: Runnable) -> int:
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            step_of_first_scalar(graph)
        return counter.get_total_flops()

    graphs = ranks.graphs
    assert ranks.run(ran) == [step_of(Rewritten(x.graph_module, x.context)).flops() for x in graphs]
