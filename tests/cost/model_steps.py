"""Training steps of causal language models, of three layers that stand for all, as published runs made them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import sptransform as sp
from sptransform.cost.data_parallel import with_parameter_shards
from sptransform.cost.folding import LayerRun
from sptransform.cost.hardware import Hardware
from sptransform.cost.read import step_of
from sptransform.cost.records import Step
from sptransform.cost.simulate import Timeline, simulate
from sptransform.cost.times import memory_seconds

HEADS = {"head_dim": 128, "num_key_value_heads": 8}
# name -> (class, layers, sizes)
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Qwen3-0.6B": (
        "Qwen3",
        28,
        {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "tie_word_embeddings": True},
    ),
    "Qwen3-4B": (
        "Qwen3",
        36,
        {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "tie_word_embeddings": True},
    ),
    "Qwen3-8B": ("Qwen3", 36, {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}),
    "Qwen3-32B": ("Qwen3", 64, {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64}),
    "llama3.1-8B": (
        "Llama",
        32,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256},
    ),
}
KEPT = 3  # layers in the graph: the second stands for all between the first and the last


def causal_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **options: Any) -> tuple:
    """Causal attention without a mask, as flash-attn computes it; one device then sees no mask that hides nothing."""
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scaling"], enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", causal_attention)
AttentionMaskInterface.register("causal", lambda *args, **kwargs: None)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        model: of MODELS.
        length: tokens of a sequence, of all ranks that share it.
        batch: sequences.
        strategy: how ``ranks`` share a sequence.
        ranks: that share a sequence; 1 is one device.
        checkpoint: "full" computes every layer again; "selective" the half of its products, and what is cheap.
        compiled: whether pointwise ops are fused.
        caller: whether the caller computes the loss, of logits in float32 that it keeps until the backward is done.
    """

    model: str
    length: int
    batch: int = 1
    strategy: str | sp.Strategy = "ulysses"
    ranks: int = 1
    checkpoint: str = "full"
    compiled: bool = False
    caller: bool = False


class WithLoss(nn.Module):
    """What a training script does with the logits of ``model``, which it still names during the backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.causal = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.causal(input_ids).logits.float()
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.mean(), logits.detach()


@cache
def model_step(run: Run) -> tuple[Step, tuple[tuple[str, int], ...]]:
    """The step of the last rank, and the number of parameters of each unit that is gathered at a time."""
    kind, layers, sizes = MODELS[run.model]
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": 151936, "tie_word_embeddings": False, **HEADS, **sizes},
        num_hidden_layers=KEPT,
        max_position_embeddings=run.length,
        use_cache=False,
    )
    config._attn_implementation = "causal"
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).train()
        tokens = torch.empty(run.batch, run.length, dtype=torch.long)
    model.gradient_checkpointing_enable()
    outputs = {"outputs": "loss"} if run.ranks > 1 else {}
    inputs = {"input_ids": tokens, "labels": tokens}
    prefix = "causal.model.layers" if run.caller else "model.layers"
    whole = WithLoss(model) if run.caller else model
    rewritten = sp.rewrite(whole, run.strategy, inputs, world_size=run.ranks, rank=run.ranks - 1, **outputs)
    runs = {f"{prefix}.1": LayerRun(f"{prefix}.1", layers - KEPT + 1)}
    step = step_of(rewritten, fuse=run.compiled, runs=runs)
    if run.checkpoint == "selective":
        step = _selective(step)
    units = {f"{prefix}.{i}": sum(p.numel() for p in model.model.layers[i].parameters()) for i in range(KEPT)}
    units = {"": sum(p.numel() for p in model.parameters()) - sum(units.values()), **units}
    return step, tuple(units.items())


def _selective(step: Step) -> Step:
    """Attention and every second product are saved, so that the backward does not compute them again."""
    again = {work.name for work in step.of("forward") if work.kind in ("attention", "matmul")}
    works, seen = [], 0
    for work in step.works:
        if work.direction == "backward" and work.name in again:
            seen += work.kind == "matmul"
            if work.kind == "attention" or seen % 2:
                continue
        works.append(work)
    return replace(step, works=tuple(works))


def step_on(run: Run, *, sharded_over: int = 0) -> tuple[Step, int]:
    """The step with parameters in parts over so many ranks, if any, and how many parameters the model has."""
    step, given = model_step(run)
    units, layers = dict(given), MODELS[run.model][1]
    middle = next(number for unit, number in units.items() if unit.endswith(".layers.1"))
    count = sum(units.values()) + (layers - KEPT) * middle
    if sharded_over:
        step = with_parameter_shards(step, range(sharded_over), units, kept=4)
    return step, count


def timeline_of(run: Run, hardware: Hardware, *, sharded_over: int = 0) -> tuple[Timeline, int]:
    """:func:`step_on`, simulated."""
    step, count = step_on(run, sharded_over=sharded_over)
    return simulate(step, hardware), count


def optimizer_seconds(parameters: float, hardware: Hardware) -> float:
    """AdamW on float32: parameter, gradient and two moments are read, all but the gradient written."""
    return memory_seconds(7 * 4 * parameters, hardware)
