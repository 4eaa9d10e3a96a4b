"""Parameters kept in parts: whole to the model, DTensors to everybody else, and no other use of them goes unnoticed."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sptransform
from sptransform import CaptureError, UsageError
from tests.support.collective_counts import CountCollectives
from tests.support.equality import Result, assert_equal_to_one_device, one_device, run_one_device, run_parallel
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64, MODELS, build
from tests.support.tiers import tiered
from tests.support.tiny import Attention, attention_with_loss, token_inputs

pytestmark = pytest.mark.timeout(240)

# every parameter is read in a way of its own
RANKS = {"bert": 2, "gpt2": 3, "llama": 4, "torch_encoder": 2}


def parallel(model: nn.Module, **options: Any) -> nn.Module:
    strategy = options.pop("strategy", "ulysses")
    return sptransform.parallelize(model, strategy, **{"backend": "aot_eager", "shard_parameters": True} | options)


def tiny(cls: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().double()


class Manifold(Attention):
    """Parameters in a list, a dict, of the module itself; tied, frozen, scalar; read in a checkpointed region."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.tokens.weight
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(1, 16))])
        self.named = nn.ParameterDict({"shift": torch.rand(16), "frozen": torch.rand(16)})
        self.named["frozen"].requires_grad_(False)
        self.gain = nn.Parameter(torch.rand(()))
        self.mix = nn.Parameter(torch.rand(16, 16))
        self.unused = nn.Parameter(torch.rand(5))

    def between(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: functional.linear(x, self.mix) * self.scales[0], x, use_reentrant=False)
        return (x * self.scales[1][0] + self.named["shift"] * self.named["frozen"]) * self.gain

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(super().forward(tokens).flatten(0, 1), labels.flatten())


# --- the same training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiered(RANKS, quick=["torch_encoder"]))
def test_equals_one_device(name: str) -> None:
    for result in get_pool(RANKS[name]).run(run_parallel, name, "ulysses", "aot_eager", shard_parameters=True):
        assert_equal_to_one_device(one_device(name), result, MODELS[name].tolerance)
        assert any("reduce_scatter" in collective.name for collective in result.backward)


def manifold(rank: int, world_size: int) -> tuple[Result, dict[str, Any]]:
    model = tiny(Manifold)
    keys, classes = list(model.state_dict()), [repr(type(module)) for module in model.modules()]
    parallel(model)
    result = run_one_device(model, token_inputs())
    assert list(model.state_dict()) == keys and [repr(type(module)) for module in model.modules()] == classes
    assert model.head.weight is model.tokens.weight and isinstance(model.qkv, nn.Linear)
    named = model.named_parameters()
    return result, {name: (p.placements[0], p.requires_grad, p.to_local().numel()) for name, p in named}


@pytest.mark.parametrize("world_size", tiered([2, 3], quick=[2]))
def test_every_way_to_have_parameters(world_size: int) -> None:
    expected = run_one_device(tiny(Manifold), token_inputs())
    sizes = {name: p.numel() for name, p in tiny(Manifold).named_parameters()}
    found = get_pool(world_size).run(manifold)
    for result, placements in found:
        assert_equal_to_one_device(expected, result, FLOAT64)
        whole = {name for name, (placement, _, _) in placements.items() if placement == Replicate()}
        assert whole == {"gain", "scales.1"}  # of which there is not an index for each rank
        assert [name for name, (_, trained, _) in placements.items() if not trained] == ["named.frozen"]
    for name in sizes.keys() - {"gain", "scales.1"}:
        assert sum(placements[name][2] for _, placements in found) == sizes[name]


def modes(rank: int, world_size: int, strategy: str) -> list[tuple[Tensor, int]]:
    """Losses of an evaluation before any training, of training, and of another length."""
    model, inputs = build("sdpa_transformer", layers=1)
    parallel(model, strategy=strategy, shard_parameters=strategy != "megatron")
    found = []
    calls = [(torch.inference_mode, 64), (torch.no_grad, 64), (torch.enable_grad, 64), (torch.no_grad, 32)]
    for mode, seq_len in calls:
        shorter = {name: x[:, :seq_len] for name, x in inputs.items()}
        with CountCollectives() as counted, mode():
            loss = model(**shorter)
        if loss.requires_grad:
            loss.backward()
        found.append((loss.detach().clone(), len(counted.collectives)))
    parts = [p for p in model.parameters() if p.placements[0] != Replicate()]
    assert len(parts) > 5 and all(p.grad.placements == p.placements for p in parts)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["megatron", "ulysses"])
def test_evaluation_comes_first(strategy: str) -> None:
    model, inputs = build("sdpa_transformer", layers=1)
    expected = [model(**{name: x[:, :n] for name, x in inputs.items()}).detach() for n in (64, 64, 64, 32)]
    for found in get_pool(2).run(modes, strategy):
        for (loss, num_collectives), want in zip(found, expected, strict=True):
            torch.testing.assert_close(loss, want, rtol=FLOAT64, atol=0)
            assert num_collectives


def generates(rank: int, world_size: int, strategy: str) -> Tensor:
    model, inputs = build("llama", layers=1)
    parallel(model, strategy=strategy, shard_parameters=strategy != "megatron")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = model.generate(inputs["input_ids"][:, :16], **options)
    model(**inputs).loss.backward()
    after = model.generate(inputs["input_ids"][:, :16], **options)
    assert torch.equal(before, after)
    return after


@pytest.mark.parametrize("strategy", tiered(["megatron", "ulysses"], quick=["megatron"]))
def test_generation(strategy: str) -> None:
    model, inputs = build("llama", layers=1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(inputs["input_ids"][:, :16], **options)
    for tokens in get_pool(2).run(generates, strategy):
        assert torch.equal(tokens, expected)


def with_fsdp(rank: int, world_size: int, strategy: str) -> Result:
    """FSDP2 over two groups, each of which has half of the batch; its gradients are means."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sp"))
    model, inputs = attention_with_loss(), token_inputs()
    sharing = {"inputs": inputs} if strategy == "megatron" else {"shard_parameters": True}
    sptransform.parallelize(model, strategy, mesh=mesh["sp"], backend="aot_eager", **sharing)
    fully_shard(model, mesh=mesh["data"])
    return run_one_device(model, {name: x.chunk(2)[mesh["data"].get_local_rank()] for name, x in inputs.items()})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["megatron", "ulysses"])
def test_fsdp_over_parts(strategy: str) -> None:
    batches = [{name: x.chunk(2)[i] for name, x in token_inputs().items()} for i in range(2)]
    halves = [run_one_device(attention_with_loss(), batch) for batch in batches]
    mean = {name: (grad + halves[1].grads[name]) / 2 for name, grad in halves[0].grads.items()}
    for rank, result in enumerate(get_pool(4).run(with_fsdp, strategy, timeout=180)):
        assert_equal_to_one_device(Result(halves[rank // 2].loss, mean), result, FLOAT64)


# --- modules stay modules -------------------------------------------------------------------------------------


def attributes(rank: int, world_size: int) -> None:
    model = parallel(tiny(Manifold))
    linear, weight = model.qkv, model.qkv.weight
    assert isinstance(weight, DTensor) and isinstance(weight, nn.Parameter)
    del linear.weight
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight'"):
        _ = linear.weight
    linear.weight = torch.ones(3)  # as weight_norm has it
    assert linear.weight.shape == (3,)
    del linear.weight
    linear.register_parameter("weight", weight)
    assert linear.weight is weight
    with pytest.raises(TypeError, match="cannot assign"):
        linear.weight = torch.ones(3)
    model.head.weight = model.mix
    assert model.head.weight is model.mix
    linear.bias = None
    assert linear.bias is None


def test_attributes_are_set_and_deleted_as_ever() -> None:
    get_pool(2).run(attributes)


def copies(rank: int, world_size: int) -> list[tuple[Result, bool]]:
    model = parallel(tiny(Manifold))
    found = []
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if world_size == 1 else copy.deepcopy(model)):
        assert type(each.qkv) is type(model.qkv) and each.head.weight is each.tokens.weight
        assert each.qkv.weight is not model.qkv.weight
        sptransform.parallelize(each, "ulysses", backend="aot_eager")
        found.append((run_one_device(each, token_inputs()), isinstance(each.qkv.weight, DTensor)))
    assert model.qkv.weight.grad is None
    return found


@pytest.mark.slow
def test_copies() -> None:
    """A copy keeps parts too; whoever wants it to run says how, as of every copy."""
    expected = run_one_device(tiny(Manifold), token_inputs())
    for found in get_pool(2).run(copies):
        for result, is_kept in found:
            assert is_kept
            assert_equal_to_one_device(expected, result, FLOAT64)


def one_rank(rank: int, world_size: int) -> bool:
    model = parallel(tiny(Manifold))
    run_one_device(model, token_inputs())
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_one_rank_keeps_everything() -> None:
    assert get_pool(1).run(one_rank) == [False]


def told(rank: int, world_size: int) -> bool:
    """What was said of a parameter, and its gradient, are those of its part."""
    model = tiny(Manifold)
    model.qkv.bias.no_decay = True
    run_one_device(model, token_inputs())
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    parallel(model)
    assert model.qkv.bias.no_decay
    run_one_device(model, token_inputs())
    return all(torch.allclose(model.get_parameter(name).grad.full_tensor(), 2 * before[name]) for name in before)


def test_what_a_parameter_has_goes_with_it() -> None:
    assert all(get_pool(2).run(told))


# --- nothing else goes unnoticed ------------------------------------------------------------------------------


class Raw(Attention):
    """Reads a parameter past the module's attribute."""

    def between(self, x: Tensor) -> Tensor:
        return x * self._parameters["gain"].to_local().sum()

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(16))


class Listed(Attention):
    """Reads a parameter from a list that nobody else knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.own = [self.qkv.bias]

    def between(self, x: Tensor) -> Tensor:
        return x * self.own[0][:16]


class Overlaid(Attention):
    """Two parameters in the same memory."""

    def double(self) -> Overlaid:
        super().double()
        self.other = nn.Parameter(self.qkv.bias.data)
        return self


def with_early_optimizer() -> None:
    model = tiny(Attention)
    optimizer = torch.optim.AdamW(model.parameters())
    parallel(model)(token_inputs()["tokens"]).full_tensor().sum().backward()
    optimizer.step()


def with_early_list() -> None:
    model = tiny(Attention)
    parameters = list(model.parameters())
    parallel(model)(token_inputs()["tokens"]).full_tensor().sum().backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)


def with_early_hook() -> None:
    model = tiny(Attention)
    model.head.weight.register_hook(lambda grad: 2 * grad)
    parallel(model)


def with_late_hook() -> None:
    """The first call is to cut it, and the hook would go."""
    model = parallel(tiny(Attention), strategy="megatron", shard_parameters=False)
    model.head.weight.register_hook(lambda grad: 2 * grad)
    model(token_inputs()["tokens"])


def twice() -> None:
    parallel(copy.deepcopy(parallel(tiny(Attention))))


def over_other_ranks() -> None:
    copied = copy.deepcopy(parallel(tiny(Attention)))
    mesh = DeviceMesh("cpu", [1, 0])
    sptransform.parallelize(copied, "ulysses", backend="aot_eager", mesh=mesh)(token_inputs()["tokens"])


def unreduced() -> None:
    copied = copy.deepcopy(parallel(tiny(Attention)))
    sptransform.parallelize(copied, "ulysses", backend="aot_eager", grad_sync=False)(token_inputs()["tokens"])


def pending() -> None:
    model = parallel(tiny(Attention))
    kept = model.head.bias
    local = kept.to_local().detach()
    model.head.bias = nn.Parameter(DTensor.from_local(local, kept.device_mesh, [Partial()], run_check=False))
    model(token_inputs()["tokens"])


def without_memory() -> None:
    with torch.device("meta"):
        model = Attention().double()
    parallel(model)(token_inputs()["tokens"])


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "read past the attribute": (
        lambda: parallel(tiny(Raw))(token_inputs()["tokens"]),
        CaptureError,
        "a DTensor is not an input",
    ),
    "read from a list": (
        lambda: parallel(tiny(Listed))(token_inputs()["tokens"]),
        Exception,
        "not the model's any more",
    ),
    "of an optimizer made before": (with_early_optimizer, UsageError, "not the model's any more"),
    "clipped by an old list": (with_early_list, UsageError, "not the model's any more"),
    "with a hook before": (with_early_hook, UsageError, "'head.weight' has a hook"),
    "with a hook before the first call": (with_late_hook, UsageError, "'head.weight' cannot be cut"),
    "in the memory of another": (lambda: parallel(tiny(Overlaid)), UsageError, "'qkv.bias' lies where 'other' does"),
    "in parts already": (twice, UsageError, "is a DTensor"),
    "in parts of another mesh": (over_other_ranks, UsageError, "other ranks share them"),
    "in parts, gradients unreduced": (unreduced, UsageError, "grad_sync=False"),
    "a pending sum": (pending, Exception, "shared in a way"),
    "without memory": (without_memory, Exception, "meta"),
    "with unreduced gradients": (lambda: parallel(tiny(Attention), grad_sync=False), UsageError, "complete gradients"),
    "cut by megatron too": (lambda: parallel(tiny(Attention), strategy="megatron"), UsageError, "its own dimensions"),
    "by the plain backend": (
        lambda: torch.compile(tiny(Attention), backend="sptransform", options={"shard_parameters": True})(
            token_inputs()["tokens"]
        ),
        Exception,
        "cannot change parameters",
    ),
}


def refused(rank: int, world_size: int, name: str) -> tuple[str, str]:
    call, kind, _ = BAD[name]
    logging.disable(logging.CRITICAL)
    try:
        call()
    except kind as error:
        return type(error).__name__, str(error)
    finally:
        logging.disable(logging.NOTSET)
    return "", ""


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    for kind, text in get_pool(2).run(refused, name, timeout=60):
        assert BAD[name][2] in text, (kind, text)
