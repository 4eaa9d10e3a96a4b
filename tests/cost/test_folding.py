"""Equal layers counted once are the layers counted one by one: messages, bytes and FLOPs, and the most that is held."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from sptransform.compiler.fake_models import without_meta
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewritten_for, while_captured
from sptransform.compiler.trials import trials
from sptransform.cost.folding import LayerRun, fold_layers
from sptransform.cost.read import step_of
from sptransform.cost.records import Step
from sptransform.sharding.mesh import Mesh

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

Model = tuple[nn.Module, dict[str, Any]]


class Layer(nn.Module):
    """``kind``: of its activation."""

    def __init__(self, kind: int, width: int = 64) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))
        inner = self.up(x)
        return x + self.down(inner.tanh() if self.kind else gelu(inner))


class OneList(nn.Module):
    def __init__(self, kinds: list[int]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 64), nn.Linear(64, 256)
        self.layers = nn.ModuleList(map(Layer, kinds))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def one_list(*kinds: int) -> Model:
    return OneList([*kinds]), {"tokens": torch.empty(1, 512, dtype=torch.long)}


def t5(num_layers: int = 8, num_decoder_layers: int = 8) -> Model:
    sizes = {"vocab_size": 256, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "dropout_rate": 0.0}
    layers = {"num_layers": num_layers, "num_decoder_layers": num_decoder_layers}
    model = T5ForConditionalGeneration(T5Config(**sizes, **layers, use_cache=False, decoder_start_token_id=0))
    tokens = torch.empty(1, 512, dtype=torch.long)
    return model.train(), {"input_ids": tokens, "labels": tokens}


def llama() -> Model:
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, use_cache=False))
    tokens = torch.empty(1, 512, dtype=torch.long)
    return model.train(), {"input_ids": tokens, "labels": tokens}


def checkpointed(model: nn.Module, inputs: dict[str, Any]) -> Model:
    model.gradient_checkpointing_enable()
    return model, inputs


def steps(build: Callable[[], Model], strategy: str) -> tuple[Step, Step, dict[str, LayerRun]]:
    """With equal layers folded, and without; parameters of different layers share no message in either."""
    with torch.device("meta"):
        model, inputs = build()
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    apart = [f"{name}.{i}" for name, module in lists.items() for i in range(len(module))]
    model, inputs = without_meta(model, inputs)
    options = Options.of({"strategy": strategy, "outputs": "dtensor"})

    def use(gm: fx.GraphModule, given: list[Any]) -> tuple[Step, Step, dict[str, LayerRun]]:
        folded = fold_layers(gm, given)

        def step(gm: fx.GraphModule, given: list[Any], runs: dict[str, LayerRun]) -> Step:
            trial = trials(partial(rewritten_for, apart=apart), gm, given, options, Mesh.pretended(2))
            return step_of(trial(options.strategy, (2,), 1), runs=runs)

        return step(folded.graph_module, folded.inputs, folded.runs), step(gm, given, {}), folded.runs

    return while_captured(model, use, **inputs)


@pytest.mark.parametrize(
    ("build", "times", "strategy"),
    [
        (partial(one_list, *[0] * 8, *[1] * 8), [6, 6], "ring"),
        (partial(one_list, *[0, 1] * 8), [6, 6], "megatron"),
        (t5, [5, 5], "ulysses"),
        (partial(t5, 5, 8), [2, 5], "ring"),
        (lambda: checkpointed(*t5()), [4, 4], "megatron"),
        (lambda: checkpointed(*llama()), [6], "ulysses"),
    ],
    ids=["two runs", "alternating", "t5 8+8", "t5 5+8", "t5 checkpointed", "llama checkpointed"],
)
def test_equal_layers_once_are_all_of_them(build: Callable[[], Model], times: list[int], strategy: str) -> None:
    folded, flat, runs = steps(build, strategy)
    assert [run.times for run in runs.values()] == times
    for direction in ("forward", "backward"):
        assert folded.flops(direction) == flat.flops(direction)
        assert folded.messages(direction) == flat.messages(direction)
        assert folded.bytes_sent(direction) == flat.bytes_sent(direction)
    assert (folded.parameters, folded.gradients, folded.inputs) == (flat.parameters, flat.gradients, flat.inputs)
    assert folded.peak_bytes() == pytest.approx(flat.peak_bytes(), rel=0.01)
    assert kernels(folded) == kernels(flat)


def kernels(step: Step) -> list[tuple[str, str]]:
    """What computes, in order; of a path the list, without the number."""
    works = (work for work in step.unrolled() if work.kind in ("attention", "matmul"))
    return [(work.op, work.layer.split(".", 1)[0]) for work in works]
