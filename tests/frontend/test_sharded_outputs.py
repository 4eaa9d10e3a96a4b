"""Losses behind the call: torch functions on what a model returns in parts give what one device gives."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sptransform
from sptransform import UnsupportedOpError, UsageError
from tests.support.collective_counts import CountCollectives
from tests.support.gloo_pool import get_pool
from tests.support.tiers import tiered
from tests.support.tiny import Attention, token_inputs

pytestmark = pytest.mark.timeout(240)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NUM = 29  # of this many classes no number of ranks that is tested has an equal share


class Logits(Attention):
    """Logits of an odd number of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, NUM)


def model() -> Logits:
    torch.manual_seed(0)
    return Logits().double()


def others(seq_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, a mask and another model's logits: plain tensors, equal on all ranks."""
    generator = torch.Generator().manual_seed(1)
    tokens = token_inputs()["tokens"][:, :seq_len]
    labels = torch.randint(NUM, tokens.shape, generator=generator)
    mask = torch.rand(tokens.shape, generator=generator) > 0.3
    mask[:, 0] = True
    logits = torch.randn(*tokens.shape, NUM, dtype=torch.float64, generator=generator)
    return tokens, labels, mask, logits.requires_grad_()


def of_labels(x: Tensor, labels: Tensor) -> Tensor:
    return x.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def as_trl(x: Tensor, labels: Tensor) -> Tensor:
    chosen = torch.gather(x, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in x])


def preferred(x: Tensor, labels: Tensor, mask: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """As DPO: the first sequence of a pair over the second."""
    total = (of(x[:, :-1], labels[:, 1:]) * mask[:, 1:]).sum(-1)
    return -functional.logsigmoid(0.1 * (total[0] - total[1]))


def clipped(x: Tensor, old: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """As GRPO."""
    ratio = (of_labels(x, labels) - of_labels(old, labels).detach()).exp()
    gain = torch.min(ratio * mask, ratio.clamp(0.8, 1.2) * mask)
    return -(gain.sum(1) / mask.sum(1)).mean()


def written(x: Tensor, old: Tensor) -> Tensor:
    """Numbers that leave torch are those of the whole tensor."""
    values = x.detach()
    return x.sin().sum() * values.mean().item() + float(values.sum()) * old.mean() + sum(values[0, 0].tolist())


def through_checkpoint(x: Tensor, labels: Tensor) -> Tensor:
    return checkpoint(lambda x: of_labels(x, labels).mean(), x, use_reentrant=False)


def counted(x: Tensor) -> Tensor:
    """One object, of which the number changes, bounds slices."""
    bound, total = torch.tensor(0), x.sum()
    for _ in range(3):
        bound += 1
        total = total + x[:, :bound].sin().sum() * int(bound) + x[:, bound:].cos().sum()
    return total


def of_gradients(x: Tensor, old: Tensor) -> Tensor:
    """Gradients of tensors in parts meet plain tensors and leave torch; they have gradients themselves."""
    y = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad((y.sin() * old).sum(), y, create_graph=True)
    (y.cos() * old.detach()).sum().backward()
    return grad.square().mean() + (grad * x).sum() + x.sum() * y.grad.square().sum().item() + (y.grad * old).mean()


def hooked(x: Tensor, old: Tensor) -> Tensor:
    """Hooks change gradients by plain tensors, by numbers of the whole gradient, and to whole tensors."""
    y, z, whole = x * 1, x * 2, x * 3
    y.register_hook(lambda grad: grad * old.detach() / grad.norm())
    z.register_hook(lambda grad: None)
    whole.register_hook(lambda grad: old.detach())
    return ((y.sin() + z.cos() + whole) * old).sum()


def compiled(x: Tensor, labels: Tensor) -> Tensor:
    return torch.compile(lambda x, labels: of_labels(x / 2, labels).mean(), backend="eager")(x, labels)


LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda x, labels, mask, old: functional.cross_entropy(x.flatten(0, 1), labels.flatten()),
    "ignored labels": lambda x, labels, mask, old: functional.cross_entropy(
        x[:, :-1].reshape(-1, NUM), labels[:, 1:].masked_fill(~mask[:, 1:], -100).reshape(-1)
    ),
    "smoothed": lambda x, labels, mask, old: functional.cross_entropy(
        x.transpose(1, 2), labels.masked_fill(~mask, -100), label_smoothing=0.1
    ),
    "log-probabilities": lambda x, labels, mask, old: -(of_labels(x, labels) * mask).sum() / mask.sum(),
    "DPO": lambda x, labels, mask, old: preferred(x, labels, mask, of_labels),
    "DPO of TRL": lambda x, labels, mask, old: preferred(x, labels, mask, as_trl),
    "GRPO": lambda x, labels, mask, old: clipped(x, old, labels, mask),
    "distillation": lambda x, labels, mask, old: functional.kl_div(
        functional.log_softmax(x / 2, -1), functional.softmax(old / 2, -1), reduction="batchmean"
    ),
    "mean square": lambda x, labels, mask, old: functional.mse_loss(x, old),
    "entropy": lambda x, labels, mask, old: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "last token": lambda x, labels, mask, old: x[:, -1].sin().sum() + x[torch.arange(2), mask.sum(1) - 1].cos().sum(),
    "picked tokens": lambda x, labels, mask, old: x[mask].sin().sum() + x.masked_fill(~mask[..., None], 0).cos().mean(),
    "joined": lambda x, labels, mask, old: (torch.cat([x, old], 1) * (x + old).repeat(1, 2, 1)).sum(),
    "in and out of python": lambda x, labels, mask, old: written(x, old),
    "whole rows": lambda x, labels, mask, old: x.std() + x.var(1).sum() + x.norm() + x.cumsum(1).sin().sum() + x.max(),
    "pieces": lambda x, labels, mask, old: sum(i * row.sin().sum() for i, row in enumerate(x.flip(1).chunk(3, 2))),
    "checkpointed": lambda x, labels, mask, old: through_checkpoint(x, labels),
    "bounds in tensors": lambda x, labels, mask, old: counted(x),
    "arrays": lambda x, labels, mask, old: x[:, np.array([0, 1])].sin().sum() + x[mask.numpy()].cos().sum(),
    "no tokens": lambda x, labels, mask, old: x[:, :0].sum() + x[:, x.shape[1] :].sin().sum() + x.sin().sum(),
    "gradients": lambda x, labels, mask, old: of_gradients(x, old),
    "hooks": lambda x, labels, mask, old: hooked(x, old),
    "compiled": lambda x, labels, mask, old: compiled(x, labels),
    "a weight of its own": lambda x, labels, mask, old: functional.linear(x, old[0]).sin().mean() + (x.mT @ old).sum(),
}
EXACT = 1e-12


def run(parallel: nn.Module, names: list[str], seq_len: int) -> dict[str, list[Tensor]]:
    """Value, gradients of the parameters and of the other logits, of each loss."""
    found = {}
    for name in names:
        tokens, labels, mask, old = others(seq_len)
        parallel.zero_grad()
        loss = LOSSES[name](parallel(tokens), labels, mask, old)
        assert type(loss) is Tensor
        loss.backward()
        grads = [x.grad for x in (*parallel.parameters(), old) if x.grad is not None]
        found[name] = [x.full_tensor() if isinstance(x, DTensor) else x.clone() for x in (loss.detach(), *grads)]
    return found


def on_ranks(
    rank: int, world_size: int, strategy: Any, seq_len: int, names: list[str], options: dict[str, Any]
) -> dict[str, list[Tensor]]:
    shape = (2, 2) if isinstance(strategy, tuple) else (world_size,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("cp", "tp")[: len(shape)])
    parallel = sptransform.parallelize(model(), strategy, mesh=mesh, backend="aot_eager", **options)
    return run(parallel, names, seq_len)


def check(world_size: int, strategy: Any, seq_len: int, names: list[str], **options: Any) -> None:
    expected = run(model(), names, seq_len)
    for result in get_pool(world_size).run(on_ranks, strategy, seq_len, names, options, timeout=200):
        for name in names:
            for got, true in zip(result[name], expected[name], strict=True):
                torch.testing.assert_close(got, true, rtol=EXACT, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}")


SHARP = ["bounds in tensors", "ignored labels", "DPO of TRL", "distillation", "in and out of python"]
SHARP += ["a weight of its own"]


@pytest.mark.parametrize("strategy", tiered(["ulysses", "megatron", "ring"], quick=["ulysses", "megatron"]))
def test_losses(strategy: str) -> None:
    """Logits are cut along the sequence, or along the classes."""
    check(2, strategy, 16, SHARP if strategy != "ring" else [*LOSSES])


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [16, 13])
@pytest.mark.parametrize("strategy", ["ulysses", "allgather", "megatron"])
def test_every_loss(strategy: str, seq_len: int) -> None:
    check(2, strategy, seq_len, [*LOSSES])


@pytest.mark.slow
def test_three_ranks_and_parameters_in_parts() -> None:
    check(3, "ring", 16, [*LOSSES], shard_parameters=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["usp", ("ring", "megatron")], ids=str)
def test_over_two_mesh_dims(strategy: Any) -> None:
    check(4, strategy, 16, [*LOSSES])


@pytest.mark.slow
def test_whole_outputs() -> None:
    check(2, "ulysses", 16, [*LOSSES], outputs="full")


# --- how it is done ---------------------------------------------------------------------------------------------


def sent(rank: int, world_size: int, strategy: str) -> dict[str, set[str]]:
    """What is sent by the losses that need no whole logits, of one row: their flattened logits are contiguous."""
    parallel = sptransform.parallelize(model(), strategy, backend="aot_eager")
    tokens, labels, mask, old = (x[:1] for x in others(16))
    found = {}
    for name in ("cross_entropy", "ignored labels", "log-probabilities", "distillation", "mean square", "entropy"):
        out = parallel(tokens)
        with CountCollectives() as counted:
            LOSSES[name](out, labels, mask, old)
        found[name] = {each.name for each in counted.collectives if each.sent_bytes > 16 * NUM}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "megatron"])
def test_no_logits_are_sent(strategy: str) -> None:
    for found in get_pool(2).run(sent, strategy, timeout=150):
        assert not any("gather" in kind for kinds in found.values() for kind in kinds), found


def objects(rank: int, world_size: int) -> None:
    parallel = sptransform.parallelize(model(), "ulysses", backend="aot_eager")
    tokens, _, _, old = others(16)
    x = parallel(tokens)
    assert isinstance(x, DTensor) and type(x + old) is type(x) and type(x.sum()) is Tensor
    assert x.shape == old.shape == (2, 16, NUM) and x.ndim == 3 and len(x) == 2 and x.size(1) == 16
    assert x.to_local().shape == (2, 8, NUM) and x.full_tensor().shape == old.shape
    assert x.requires_grad and not x.detach().requires_grad and x.data.shape == old.shape and x.mT.shape == (2, NUM, 16)
    assert x in {x: 1} and "DTensor" in repr(x) and torch.is_floating_point(x) and x.is_floating_point()
    seen = []
    x.register_hook(lambda grad: seen.append(grad.full_tensor()))
    x.retain_grad()
    x.sin().sum().backward()
    torch.testing.assert_close(x.grad.full_tensor(), x.full_tensor().cos().detach())
    assert torch.equal(seen[0], x.grad.full_tensor())
    (of_x,) = torch.autograd.grad((y := parallel(tokens)).sin().sum(), y)
    torch.testing.assert_close(of_x.full_tensor(), y.full_tensor().cos().detach())
    torch.autograd.backward([z := parallel(tokens)], [of_x], inputs=[z])
    torch.testing.assert_close(z.grad.full_tensor(), of_x.full_tensor())
    file = io.BytesIO()
    for same in (copy.deepcopy(x.detach()), x.detach()):
        torch.testing.assert_close(same.full_tensor(), x.full_tensor().detach())
    torch.save(x.detach(), file)
    with torch.no_grad():
        assert torch.allclose(x, x.full_tensor()) and not parallel(tokens).sum().requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(parallel(tokens).log_softmax(-1).sum(), x.full_tensor().log_softmax(-1).sum())
    with torch.autocast("cpu", torch.bfloat16):
        assert (x.float() @ old.float().mT).dtype == torch.bfloat16
    assert (x.float() @ old.float().mT).dtype == torch.float32
    # among other DTensors, and into another model
    shared = distribute_tensor(old.detach(), x.device_mesh, x.placements)
    torch.testing.assert_close((shared * x).sum(), (old * x.full_tensor()).sum())
    with pytest.raises(IndexError, match="out of bounds"):
        x[:, 16]


def test_they_are_dtensors() -> None:
    get_pool(2).run(objects, timeout=100)


def refused(rank: int, world_size: int, what: str) -> tuple[str, str]:
    parallel = sptransform.parallelize(model(), "ulysses", backend="aot_eager", strict=what == "strict")
    tokens, _, mask, _ = others(16)
    x = parallel(tokens)
    with pytest.raises((UsageError, UnsupportedOpError)) as error:
        if what == "strict":
            x[mask]
        elif what == "set":
            x[:, 0] = 0.0
        elif what == "divided":
            x /= 2
        elif what == "an op":
            torch.ops.aten.add_.Tensor(x, 1)
        else:
            torch.mul(x, 2, out=x)
    return type(error.value).__name__, str(error.value)


def outside(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """After the first call, which may cut them, parameters are read with plain tensors."""
    strategy = "ulysses" if "shard_parameters" in options else "megatron"
    parallel, plain = sptransform.parallelize(model(), strategy, backend="aot_eager", **options), model()
    tokens = others(16)[0]
    for each in (parallel, plain):
        each(tokens)
        functional.embedding(tokens, each.tokens.weight).sin().sum().backward()
    got = parallel.tokens.weight.grad.full_tensor()
    torch.testing.assert_close(got, plain.tokens.weight.grad, rtol=EXACT, atol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"shard_parameters": True}], ids=str)
def test_parameters_read_outside(options: dict[str, Any]) -> None:
    get_pool(2).run(outside, options, timeout=100)


def of_terms(rank: int, world_size: int) -> str:
    parallel = sptransform.parallelize(model(), "ulysses", backend="aot_eager", grad_sync=False)
    x, weight = parallel(others(16)[0]), parallel.head.weight
    assert (x @ weight.detach()).requires_grad and (x @ nn.Parameter(weight.detach())).requires_grad
    with torch.no_grad():
        x @ weight
    with pytest.raises(UsageError) as error:
        x @ weight
    return str(error.value)


@pytest.mark.slow
def test_no_whole_gradient_is_added_to_terms() -> None:
    for text in get_pool(2).run(of_terms, timeout=100):
        assert "grad_sync=True" in text and "matmul" in text


def traced(rank: int, world_size: int) -> str:
    parallel = sptransform.parallelize(model(), "ulysses", backend="aot_eager")
    x = parallel(others(16)[0])
    with pytest.raises(Unsupported) as error:
        torch.compile(lambda x: x.sin().sum(), backend="eager", fullgraph=True)(x)
    return str(error.value)


@pytest.mark.slow
def test_not_traced() -> None:
    for text in get_pool(2).run(traced, timeout=100):
        assert "outputs='full'" in text and "full_tensor()" in text


def into_another(rank: int, world_size: int) -> list[Tensor]:
    """A model gets what another returns, made into tokens behind the call."""
    parallel, plain = sptransform.parallelize(model(), "ulysses", backend="aot_eager"), model()
    tokens = others(16)[0]
    return [m(m(tokens).argmax(-1) % 7).sin().sum().detach() for m in (parallel, plain)]


@pytest.mark.slow
def test_tokens_made_behind_the_call() -> None:
    for got, true in get_pool(2).run(into_another, timeout=100):
        torch.testing.assert_close(got, true, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("what", tiered(["strict", "set", "divided", "an op", "out"], quick=["strict", "set"]))
def test_refused_by_name(what: str) -> None:
    for kind, text in get_pool(2).run(refused, what, timeout=100):
        assert kind == ("UnsupportedOpError" if what == "strict" else "UsageError")
        assert "outputs='full'" in text and ("test_sharded_outputs.py" in text or what != "strict")
