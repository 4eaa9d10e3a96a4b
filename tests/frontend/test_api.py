"""What a user meets: outputs, gradients, options, errors, and a module that stays the module it was."""

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

import sptransform
from sptransform import UnsupportedOpError, UsageError
from sptransform.compiler import backend
from sptransform.op_rules import DEFAULT_RULES
from tests.support import plain_program
from tests.support.collective_counts import CountCollectives
from tests.support.equality import (
    Result,
    assert_equal_to_one_device,
    one_device,
    run_one_device,
    run_parallel,
    worst_error,
)
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64, IGNORED, Inputs, build
from tests.support.tiers import tiered
from tests.support.tiny import BATCH, SEQ_LEN, WIDTH, AttentionWithLoss, attention_with_loss, token_inputs

pytestmark = pytest.mark.timeout(240)


# --- models ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("sptransform_tests::mirror", mutates_args=())
def mirror(x: torch.Tensor) -> torch.Tensor:
    """An op that no rule knows, as a user's own would be: reverses the last dim."""
    return x.flip(-1)


mirror.register_fake(torch.empty_like)
mirror.register_autograd(lambda ctx, grad: mirror(grad))


class Mirrored(AttentionWithLoss):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return mirror(x)


class WithoutAttention(nn.Module):
    """Nothing in it says which dim is a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(self.down(functional.gelu(self.up(states))), target)


def state_inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(BATCH, SEQ_LEN, WIDTH, dtype=torch.float64, generator=generator)
        for name in ("states", "target")
    }


def mirrored() -> nn.Module:
    torch.manual_seed(0)
    return Mirrored().double()


def without_attention() -> nn.Module:
    torch.manual_seed(0)
    return WithoutAttention().double()


def bert() -> nn.Module:
    return build("bert", layers=1)[0]


def bert_inputs() -> Inputs:
    return build("bert", layers=1)[1]


# --- what workers do ------------------------------------------------------------------------------------------


def parallel(model: nn.Module, **options: Any) -> nn.Module:
    return sptransform.parallelize(model, "ulysses", **{"backend": "aot_eager"} | options)


def step(model: nn.Module, inputs: Inputs, loss_of: Callable[[Any], torch.Tensor]) -> tuple[Result, int]:
    """One forward and backward: the loss, gradients of parameters and of inputs; the bytes sent going forward."""
    inputs = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    with CountCollectives() as counted:
        out = model(**inputs)
    loss = loss_of(out)
    loss.backward()
    assert all(x.grad is not None for x in inputs.values() if x.requires_grad)
    named = [*model.named_parameters(), *inputs.items()]
    grads = {name: x.grad.clone() for name, x in named if x.grad is not None}
    return Result(loss.detach(), grads), sum(collective.sent_bytes for collective in counted.collectives)


def compare(
    rank: int,
    world_size: int,
    make: Callable[..., nn.Module],
    arguments: dict[str, Any],
    inputs: Inputs,
    loss_of: Callable[[Any], torch.Tensor],
    **options: Any,
) -> tuple[str, float, int]:
    """The tensor that differs most between one device and this rank, by how much, and the bytes sent."""
    got, sent = step(parallel(make(**arguments), **options), inputs, loss_of)
    reference, _ = step(make(**arguments), inputs, loss_of)
    assert got.grads.keys() == reference.grads.keys()
    return *worst_error(reference, got), sent


def assert_equal(
    make: Callable[..., nn.Module],
    inputs: Inputs,
    loss_of: Callable[[Any], torch.Tensor],
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Two ranks, which do communicate, agree with one device."""
    for name, error, sent in get_pool(2).run(compare, make, arguments or {}, inputs, loss_of, **options):
        assert error <= FLOAT64, f"{name} differs by {error:.2e}"
        assert sent > 0


def itself(out: torch.Tensor) -> torch.Tensor:
    return out


def loss_field(out: Any) -> torch.Tensor:
    return out.loss


def of_logits(out: Any) -> torch.Tensor:
    """A loss that the user computes from whole logits, each rank the same."""
    logits = out.logits.full_tensor() if isinstance(out.logits, DTensor) else out.logits
    return functional.cross_entropy(logits.flatten(0, 1), bert_inputs()["labels"].flatten())


# --- outputs --------------------------------------------------------------------------------------------------


def outputs(rank: int, world_size: int, **options: Any) -> dict[str, Any]:
    """What the logits and the loss of a parallel BERT are, and their whole values."""
    out = parallel(bert(), **options)(**bert_inputs())
    found = {"is_dtensor": isinstance(out.logits, DTensor), "loss_type": type(out.loss), "loss": out.loss.detach()}
    if isinstance(out.logits, DTensor):
        found |= {"placements": out.logits.placements, "local": out.logits.to_local().detach()}
        found |= {"shape": tuple(out.logits.shape), "logits": out.logits.full_tensor().detach()}
    else:
        found |= {"shape": tuple(out.logits.shape), "logits": out.logits.detach()}
    return found


def test_logits_come_back_as_dtensors() -> None:
    expected = bert()(**bert_inputs())
    for rank, found in enumerate(get_pool(2).run(outputs)):
        assert found["is_dtensor"]
        assert found["placements"] == (Shard(1),)
        assert found["shape"] == tuple(expected.logits.shape)
        torch.testing.assert_close(found["logits"], expected.logits.detach(), rtol=FLOAT64, atol=FLOAT64)
        torch.testing.assert_close(found["local"], expected.logits.detach().chunk(2, 1)[rank], rtol=0, atol=FLOAT64)
        assert found["loss_type"] is torch.Tensor
        torch.testing.assert_close(found["loss"], expected.loss.detach(), rtol=FLOAT64, atol=0)


@pytest.mark.parametrize("kind", tiered(["full", "local"], quick=["local"]))
def test_logits_come_back_as_plain_tensors(kind: str) -> None:
    expected = bert()(**bert_inputs()).logits.detach()
    for rank, found in enumerate(get_pool(2).run(outputs, outputs=kind)):
        assert not found["is_dtensor"]
        part = expected if kind == "full" else expected.chunk(2, 1)[rank]
        torch.testing.assert_close(found["logits"], part, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("kind", tiered(["dtensor", "full"], quick=["dtensor"]))
def test_a_loss_of_the_users_own_has_the_gradients_of_one_device(kind: str) -> None:
    inputs = {name: x for name, x in bert_inputs().items() if name != "labels"}
    assert_equal(bert, inputs, of_logits, outputs=kind)


def sum_of_local(out: Any) -> torch.Tensor:
    return out.logits.square().sum()


def local_gradients(rank: int, world_size: int) -> Result:
    return step(parallel(bert(), outputs="local"), bert_inputs(), sum_of_local)[0]


def test_a_loss_of_local_logits_is_a_term_of_the_sum_over_ranks() -> None:
    reference, _ = step(bert(), bert_inputs(), sum_of_local)
    results = get_pool(2).run(local_gradients)
    whole = sum(result.loss for result in results)
    for result in results:
        assert_equal_to_one_device(reference, Result(whole, result.grads), FLOAT64)


# --- gradients ------------------------------------------------------------------------------------------------


def test_without_grad_sync_gradients_are_terms_of_the_sum_over_ranks() -> None:
    results = get_pool(2).run(run_parallel, "bert", "ulysses", "aot_eager", layers=1, grad_sync=False)
    reference = one_device("bert", layers=1)
    summed = {name: sum(result.grads[name] for result in results) for name in reference.grads}
    assert_equal_to_one_device(reference, Result(results[0].loss, summed), FLOAT64)
    for result in results:
        assert all(collective.name != "all_reduce" for collective in result.backward)
        assert worst_error(reference, result)[1] > 1e-2


def test_gradient_of_input_embeddings_is_complete_on_every_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 64, 64, dtype=torch.float64, generator=generator, requires_grad=True)
    inputs = {name: x for name, x in bert_inputs().items() if name != "input_ids"}
    assert_equal(bert, inputs | {"inputs_embeds": embeddings}, loss_field)


def evaluate(rank: int, world_size: int, frozen: bool) -> tuple[torch.Tensor, bool, bool]:
    """The loss of a model that learns nothing, whether it wants gradients, and whether ranks shared the work."""
    model = parallel(bert().eval()).requires_grad_(not frozen)
    with CountCollectives() as counted, torch.set_grad_enabled(frozen):
        loss = model(**bert_inputs()).loss
    return loss.detach(), loss.requires_grad, bool(counted.collectives)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "no_grad"])
def test_forward_alone(frozen: bool) -> None:
    for loss, requires_grad, communicated in get_pool(2).run(evaluate, frozen):
        torch.testing.assert_close(loss, one_device("bert", layers=1).loss, rtol=FLOAT64, atol=0)
        assert not requires_grad
        assert communicated


# --- losses ---------------------------------------------------------------------------------------------------

LOSSES = [
    {"reduction": "mean"},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"reduction": "mean", "label_smoothing": 0.1},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "mean", "weight": None},
    {"reduction": "mean", "weight": None, "label_smoothing": 0.1},
    {"reduction": "sum", "weight": None},
]


def weighted(losses: torch.Tensor) -> torch.Tensor:
    """A scalar of a loss that may be one entry a token, each of which counts."""
    return (losses * torch.arange(1, losses.numel() + 1, dtype=losses.dtype).view(losses.shape)).sum()


@pytest.mark.parametrize(
    "loss", tiered(LOSSES, quick=LOSSES[5:7]), ids=lambda loss: "-".join(f"{k}={v}" for k, v in loss.items())
)
def test_cross_entropy(loss: dict[str, Any]) -> None:
    assert_equal(attention_with_loss, token_inputs(), weighted, loss)


@pytest.mark.parametrize(
    ("empty_rank", "ignored"), tiered([(0, IGNORED), (1, IGNORED), (0, 5), (1, 5)], quick=[(1, 5)])
)
def test_a_rank_without_a_valid_label(empty_rank: int, ignored: int) -> None:
    inputs = token_inputs()
    labels = inputs["labels"]
    labels.chunk(2, 1)[empty_rank].fill_(IGNORED)
    labels[labels == IGNORED] = ignored
    for reduction in ("mean", "sum"):
        assert_equal(attention_with_loss, inputs, itself, {"reduction": reduction, "ignore_index": ignored})


# --- the module -----------------------------------------------------------------------------------------------


def keeps_identity(rank: int, world_size: int) -> None:
    model = bert()
    before = type(model), list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    assert parallel(model) is model
    model(**bert_inputs()).loss.backward()
    assert before == (type(model), list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()})
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loss = one_device("bert", layers=1).loss
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        # a copy is the one-device model again: whoever wants it parallel says so
        assert list(copied.state_dict()) == before[1]
        torch.testing.assert_close(copied(**bert_inputs()).loss.detach(), loss, rtol=FLOAT64, atol=0)


def test_the_module_stays_what_it_was() -> None:
    get_pool(2).run(keeps_identity)


def passes_on(rank: int, world_size: int) -> bool:
    """Whether the inner backend is given the graph that Dynamo made."""
    given, received = [], []
    original = backend.sptransform_backend, backend.lookup_backend

    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        received.append(gm)
        return gm

    def outer(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        given.append(gm)
        return original[0](backend.Options(backend="eager"), gm, inputs)

    backend.lookup_backend = lambda name: inner
    try:
        loss = torch.compile(bert(), backend=outer, fullgraph=True)(**bert_inputs()).loss
    finally:
        backend.lookup_backend = original[1]
    torch.testing.assert_close(loss.detach(), one_device("bert", layers=1).loss, rtol=FLOAT64, atol=0)
    return len(given) == 1 and given[0] is received[0]


def test_one_rank_runs_the_graph_as_it_is() -> None:
    assert get_pool(1).run(passes_on) == [True]


# --- the plain backend ----------------------------------------------------------------------------------------

def test_plain_backend_needs_no_import_of_this_package(tmp_path: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    results = [tmp_path / f"result{rank}" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, plain_program.__file__, str(rank), str(tmp_path / "store"), str(result)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    model, x = plain_program.model_and_input()
    reference = run_one_device(model, {"x": x})
    for result in results:
        assert_equal_to_one_device(reference, Result(*torch.load(result)), FLOAT64)


def plainly_compiled(rank: int, world_size: int) -> Result:
    options = {"strategy": "ulysses", "backend": "aot_eager"}
    result = run_one_device(torch.compile(bert(), backend="sptransform", options=options), bert_inputs())
    return Result(result.loss, {name.removeprefix("_orig_mod."): grad for name, grad in result.grads.items()})


@pytest.mark.slow
def test_plain_backend_takes_models_of_libraries() -> None:
    for result in get_pool(2).run(plainly_compiled):
        assert_equal_to_one_device(one_device("bert", layers=1), result, FLOAT64)


# --- ops without a rule, graphs without attention -------------------------------------------------------------


def rewrite(model: nn.Module, inputs: Inputs, **options: Any) -> sptransform.Rewritten:
    return sptransform.rewrite(model, "ulysses", inputs, world_size=2, **options)


def raises_strictly(rank: int, world_size: int) -> str:
    with pytest.raises(UnsupportedOpError) as error:
        parallel(mirrored(), strict=True)(**token_inputs())
    return str(error.value)


def test_strict_names_the_op_without_a_rule_and_the_users_line() -> None:
    with pytest.raises(UnsupportedOpError) as error:
        rewrite(mirrored(), token_inputs(), strict=True)
    for message in (str(error.value), *get_pool(2).run(raises_strictly)):
        assert "sptransform_tests.mirror.default" in message
        assert f"{__file__}:" in message
        assert "return mirror(x)" in message
        assert "strict=False" in message


def test_an_op_without_a_rule_runs_replicated_and_is_recorded() -> None:
    assert_equal(mirrored, token_inputs(), itself)
    (fallback,) = rewrite(mirrored(), token_inputs()).context.result.fallbacks
    assert fallback.op == "sptransform_tests.mirror.default"
    assert fallback.source is not None and fallback.source.endswith("return mirror(x)")
    assert fallback.gathered_bytes == BATCH * SEQ_LEN * WIDTH * 8
    assert rewrite(attention_with_loss(), token_inputs()).context.result.fallbacks == []


def raises_without_attention(rank: int, world_size: int) -> str:
    with pytest.raises(UsageError) as error:
        parallel(without_attention())(**state_inputs())
    return str(error.value)


def test_a_graph_without_attention_asks_for_sequence_dims() -> None:
    for message in get_pool(2).run(raises_without_attention):
        assert "sequence_dims" in message
        assert "states" in message and "target" in message


@pytest.mark.parametrize(
    "sequence_dims", tiered([{"states": 1}, {"states": 1, "target": 1}, {"states": 0}], quick=[{"states": 1}])
)
def test_sequence_dims_say_what_attention_does_not(sequence_dims: dict[str, int]) -> None:
    assert_equal(without_attention, state_inputs(), itself, sequence_dims=sequence_dims)


@pytest.mark.parametrize("sequence_dims", [{"token": 1}, {"tokens": 2}])
def test_sequence_dims_of_no_input_are_refused(sequence_dims: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="tokens"):
        rewrite(attention_with_loss(), token_inputs(), sequence_dims=sequence_dims)


# --- wrong arguments ------------------------------------------------------------------------------------------

WRONG = [
    ({"strategy": "ulises"}, "'ulises'"),
    ({"strategy": 3}, "3"),
    ({"outputs": "gathered"}, "'gathered'"),
    ({"backend": "inducktor"}, "'inducktor'"),
    ({"backend": "sptransform"}, "'sptransform'"),
    ({"mesh": "sp"}, "DeviceMesh"),
    ({"sequence_dims": {1: "x"}}, "sequence_dims"),
]


def refuses(rank: int, world_size: int) -> list[str]:
    two_dims = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "sp"))
    wrong = [*(arguments for arguments, _ in WRONG), {"mesh": two_dims}]
    messages = []
    for arguments in wrong:
        model = bert()
        with pytest.raises(UsageError) as error:
            sptransform.parallelize(model, **{"strategy": "ulysses"} | arguments)
        assert model._compiled_call_impl is None
        messages.append(str(error.value))
    return messages


def test_wrong_arguments_are_refused_at_once() -> None:
    for messages in get_pool(2).run(refuses):
        *others, mesh = messages
        for message, (_, found) in zip(others, WRONG, strict=True):
            assert found in message
        assert "one mesh dim" in mesh


def test_no_process_group_is_a_usage_error() -> None:
    model = bert()
    with pytest.raises(UsageError, match="init_process_group"):
        sptransform.parallelize(model, "ulysses")
    assert model._compiled_call_impl is None


def test_only_modules_are_parallelized() -> None:
    with pytest.raises(UsageError, match=r"nn\.Module"):
        sptransform.parallelize(lambda x: x, "ulysses")  # type: ignore[type-var]


def test_rewriting_leaves_no_trace() -> None:
    """Any number of graphs of one model can be made, and it still runs as it did."""
    torch._dynamo.reset()
    model, inputs = attention_with_loss(), token_inputs()
    expected = model(**inputs)
    texts = {rewrite(model, inputs).text() for _ in range(torch._dynamo.config.recompile_limit + 2)}
    assert len(texts) == 1
    assert model._compiled_call_impl is None
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=0)


def test_the_custom_op_has_no_rule() -> None:
    assert torch.ops.sptransform_tests.mirror.default not in DEFAULT_RULES
