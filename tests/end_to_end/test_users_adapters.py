"""Adapters of PEFT: LoRA and its kin, prompts and prefixes. Trained, saved, and loaded in the plain model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import sptransform
from tests.support.gloo_pool import get_pool

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

VOCAB = 60
STRATEGIES: dict[str, dict[str, Any]] = {
    name: {"strategy": name} for name in ("ulysses", "ring", "allgather", "usp", "megatron")
}
STRATEGIES["ulysses, parameters in parts"] = {"strategy": "ulysses", "shard_parameters": True}
ATTENTION = ["q_proj", "v_proj"]
# of a Llama whose loss is computed in float32, as the model asks
VALUES, GRADIENTS = 1e-6, 2e-6


def lora(**options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": "all-linear", **options})


ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "rank-stabilised, with biases": lambda: lora(use_rslora=True, bias="lora_only"),
    "modules to save": lambda: lora(target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"]),
    "tied, of embeddings": lambda: lora(target_modules=["embed_tokens", *ATTENTION]),
    "tied, saved": lambda: lora(target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def base(is_tied: bool) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=1, vocab_size=VOCAB, tie_word_embeddings=is_tied, **sizes)
    return LlamaForCausalLM(config).double()


def adapted(kind: str, seed: int = 1) -> nn.Module:
    """A base with adapters that do something."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base("tied" in kind), ADAPTERS[kind]()).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(16) < 3, -100)}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def trained(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of two steps and an evaluation, the last gradients, and what PEFT would save."""
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], 0.1)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        losses.append(model(**batch(2)).loss)
    grads = {name: whole(x.grad) for name, x in model.named_parameters() if x.grad is not None}
    return losses, grads, {name: whole(x) for name, x in peft.get_peft_model_state_dict(model).items()}


def on_ranks(rank: int, world_size: int, kind: str, options: dict[str, Any]) -> Any:
    model = adapted(kind)
    sptransform.parallelize(model, backend="aot_eager", **options)
    return trained(model)


def assert_equal(found: Any, expected: Any) -> None:
    for got, true in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(got, true, rtol=VALUES, atol=0)
    for index in (1, 2):
        assert found[index].keys() == expected[index].keys()
        for name, true in expected[index].items():
            atol = GRADIENTS * float(true.abs().max())
            torch.testing.assert_close(found[index][name], true, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


CASES = [(kind, strategy) for kind in ADAPTERS for strategy in STRATEGIES]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_training_and_what_is_saved(kind: str, strategy: str) -> None:
    expected = trained(adapted(kind))
    for found in get_pool(2).run(on_ranks, kind, STRATEGIES[strategy], timeout=200):
        assert_equal(found, expected)


# --- files ------------------------------------------------------------------------------------------------------


def saves(rank: int, world_size: int, kind: str, options: dict[str, Any], folder: str) -> Tensor:
    """Trains, saves in both ways, and goes on from what was saved with adapters that were other ones."""
    model = adapted(kind)
    sptransform.parallelize(model, backend="aot_eager", **options)
    trained(model)
    state = {name: x for name, x in model.state_dict().items() if model.get_parameter(name).requires_grad}
    dcp.save(state, checkpoint_id=f"{folder}/dcp")
    full = {name: whole(x) for name, x in model.state_dict().items()}  # every rank takes part, one writes
    model.save_pretrained(f"{folder}/peft", state_dict=full, is_main_process=rank == 0)
    torch.distributed.barrier()
    other = adapted(kind, seed=5)
    sptransform.parallelize(other, backend="aot_eager", **options)
    state = {name: x for name, x in other.state_dict().items() if other.get_parameter(name).requires_grad}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    other.load_state_dict(state, strict=False)
    other.eval()
    with torch.no_grad():
        return other(**batch(2)).loss


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["megatron", "ulysses, parameters in parts", "ulysses"])
@pytest.mark.parametrize("kind", ["LoRA", "modules to save"])
def test_files_load_in_the_plain_model(kind: str, strategy: str, tmp_path: Path) -> None:
    plain = adapted(kind)
    (*_, expected), _, _ = trained(plain)
    for loss in get_pool(2).run(saves, kind, STRATEGIES[strategy], str(tmp_path), timeout=200):
        torch.testing.assert_close(loss, expected, rtol=VALUES, atol=0)
    loaded = peft.PeftModel.from_pretrained(base(False), str(tmp_path / "peft")).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch(2)).loss, expected, rtol=VALUES, atol=0)


# --- dropout, and the base as a reference -----------------------------------------------------------------------


def drops(rank: int, world_size: int, options: dict[str, Any]) -> list[float]:
    """Training twice with one seed, once with another, and evaluation."""
    model = peft.get_peft_model(base(False), lora(lora_dropout=0.5)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    sptransform.parallelize(model, backend="aot_eager", **options)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**batch()).loss.item())
    return [*losses, model.eval()(**batch()).loss.item()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "megatron"])
def test_dropout(strategy: str) -> None:
    """Equal seeds give one mask, evaluation none; masks are not those of one device."""
    model = peft.get_peft_model(base(False), lora()).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    expected = model(**batch()).loss.item()
    first, second = get_pool(2).run(drops, STRATEGIES[strategy], timeout=200)
    assert first == second and first[0] == first[1] != first[2]
    assert first[3] == pytest.approx(expected, rel=VALUES)


def against_its_base(model: nn.Module) -> list[Tensor]:
    """Value and gradients of the divergence from the base, which is the same model without its adapters."""
    ids = batch()["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=ids).logits.log_softmax(-1)
    found = model(input_ids=ids).logits.log_softmax(-1)
    loss = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean")
    loss.backward()
    return [loss.detach(), *(whole(x.grad) for x in model.parameters() if x.grad is not None)]


def references(rank: int, world_size: int, options: dict[str, Any]) -> list[Tensor]:
    return against_its_base(sptransform.parallelize(adapted("modules to save"), backend="aot_eager", **options))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "megatron"])
def test_the_base_is_a_reference(strategy: str) -> None:
    expected = against_its_base(adapted("modules to save"))
    for found in get_pool(2).run(references, STRATEGIES[strategy], timeout=200):
        for got, true in zip(found, expected, strict=True):
            torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)
