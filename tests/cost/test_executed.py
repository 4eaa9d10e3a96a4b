"""A step is counted as it runs: messages and bytes on gloo, FLOPs by torch's counter, and the most that is held."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import sptransform
from sptransform.compiler.rewrite import Rewritten
from sptransform.cost.op_costs import ATTENTION, attention_sizes
from sptransform.cost.read import step_of
from sptransform.ops.flops import attention_flops
from sptransform.testing.pretended import Asked, Runnable, on_pretended_ranks
from tests.support.collective_counts import RUN_NAMES, CountCollectives
from tests.support.gloo_pool import get_pool
from tests.support.memory_held import memory_held
from tests.support.models import build
from tests.support.rewritten import step_of_first_scalar

pytestmark = pytest.mark.timeout(280)

Counted = dict[tuple[str, str], tuple[int, int]]  # (direction, kind) -> messages, bytes


# name -> (class, tokens, sizes). Wide enough that tensors, not what the allocator and torch add to each, are held
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
WIDE = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, **GROUPED, "use_cache": False}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "bamba": (
        "BambaForCausalLM",
        1024,
        {
            **WIDE,
            "intermediate_size": 256,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_chunk_size": 64,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        1024,
        {"vocab_size": 512, "n_positions": 1024, "n_embd": 128, "n_layer": 2, "n_head": 8, "use_cache": False},
    ),
    "llama": ("LlamaForCausalLM", 2048, {**WIDE, "intermediate_size": 352, "dtype": "bfloat16"}),
    "mixtral": (
        "MixtralForCausalLM",
        1024,
        {**WIDE, "intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2, "dtype": "bfloat16"},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        1024,
        {
            "vocab_size": 512,
            "d_model": 128,
            "d_kv": 16,
            "d_ff": 512,
            "num_layers": 2,
            "num_heads": 8,
            "decoder_start_token_id": 0,
            "use_cache": False,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        0,
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "intermediate_size": 512,
            "image_size": 256,
            "patch_size": 8,
            "num_labels": 16,
        },
    ),
}


def build_model(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    kind, tokens, sizes = MODELS[name]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes)).to(getattr(torch, sizes.get("dtype", "float32"))).train()
    if not tokens:
        size = sizes["image_size"]
        return model, {"pixel_values": torch.randn(1, 3, size, size), "labels": torch.tensor([3])}
    ids = torch.randint(512, (1, tokens))
    return model, {"input_ids": ids, "labels": ids}


def ran_and_held(rank: int, num_ranks: int, name: str, strategies: list[Any]) -> list[tuple[Counted, int]]:
    """What a worker does: messages and bytes of a step as they ran, and what is held at its peak."""
    found = []
    for strategy in strategies:
        torch._dynamo.reset()
        model, inputs = build_model(name)
        sptransform.parallelize(model, strategy, backend="aot_eager", check_replicas="never")
        model(**inputs).loss.backward()  # compiles
        model.zero_grad()
        ran = count_messages(model, inputs)
        # the least of some: what a step returned may stay in a cycle until Python's collector comes by
        held = min(peak_of_step(model, inputs) for _ in range(3))
        found.append((ran, held))
    return found


def counted(name: str, strategy: Any, num_ranks: int, rank: int) -> tuple[Counted, int]:
    """The same, without running anything."""
    model, inputs = build_model(name)
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
    peak, _ = memory_held(found)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_ranks", "strategies"),
    [
        ("llama", 2, ["ring", "ulysses"]),
        ("llama", 2, ["allgather", "megatron"]),
        ("llama", 4, ["ulysses", "ring", "allgather"]),
        ("llama", 4, ["megatron", sptransform.USP(2, 2)]),
        ("bamba", 2, ["ulysses", "ring"]),
        ("gpt2", 2, ["ulysses", "ring"]),
        ("mixtral", 2, ["ulysses", "ring"]),
        ("t5", 2, ["ulysses", "ring"]),
        ("vit", 2, ["ulysses", "ring"]),
    ],
)
def test_a_step_is_counted_as_it_runs(name: str, num_ranks: int, strategies: list[Any]) -> None:
    for rank, of_rank in enumerate(get_pool(num_ranks).run(ran_and_held, name, strategies, timeout=250)):
        for strategy, (ran, held) in zip(strategies, of_rank, strict=True):
            messages, peak = counted(name, strategy, num_ranks, rank)
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
