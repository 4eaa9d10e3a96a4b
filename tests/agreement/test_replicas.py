"""Ranks that hold different weights, buffers, inputs or generator states are told so, all of them, in one call."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import sptransform
from sptransform import ReplicaMismatchError, UsageError
from sptransform.agreement import checksums, replicas
from sptransform.agreement.checksums import checksum, sample
from sptransform.agreement.replicas import Fact, Facts, Replicas, mismatch
from tests.support.gloo_pool import get_pool
from tests.support.golden import Golden
from tests.support.tiers import tiered
from tests.support.tiny import AttentionWithLoss, attention_with_loss, token_inputs

pytestmark = pytest.mark.timeout(180)


class Held(AttentionWithLoss):
    """Has a buffer, and dropout."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("scale", torch.ones(()).double())

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x * self.scale, self.p, self.training)


def held(p: float = 0.0) -> Held:
    torch.manual_seed(0)
    return Held(p).double()


def told(call: Callable[[], Any]) -> str:
    with pytest.raises(ReplicaMismatchError) as error:
        call()
    return str(error.value)


def mistakes(rank: int, world_size: int) -> dict[str, str]:
    """What the last rank has of its own is found, whatever it is."""
    is_odd, found = rank == world_size - 1, {}
    inputs = token_inputs()
    run = {"strategy": "ulysses", "backend": "eager"}

    model = held()
    if is_odd:
        model.qkv.weight.data[3, 3] += 1e-9
        model.head.bias.data += 1
    found["weights"] = told(lambda: sptransform.parallelize(model, **run)(**inputs))
    sptransform.broadcast_parameters(model)
    assert model(**inputs).isfinite()

    model = held()
    model.scale += is_odd
    found["buffer"] = told(lambda: sptransform.parallelize(model, **run)(**inputs))

    model = sptransform.parallelize(held(), **run)
    model(**inputs)
    other = inputs | {"labels": inputs["labels"].flip(1) if is_odd else inputs["labels"]}
    found["batch"] = told(lambda: model(**other))
    assert model(**inputs).isfinite()  # the ranks are still in step

    model = sptransform.parallelize(held(p=0.1), **run)
    torch.manual_seed(1 + is_odd)
    found["seed"] = told(lambda: model(**inputs))
    torch.manual_seed(1)
    assert model(**inputs).isfinite()
    return found


def test_every_kind_is_named_on_all_ranks(golden: Golden) -> None:
    first, *others = get_pool(3).run(mistakes)
    assert all(other == first for other in others)
    golden.check("replica_mismatch", **{kind: re.sub("[0-9a-f]{16}", "..", text) for kind, text in first.items()})


def skips_a_step(rank: int, world_size: int, check: str) -> list[str]:
    model = sptransform.parallelize(held(), "ring", backend="eager", check_replicas=check)
    optimizer, found = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(2):
        try:
            model(**token_inputs()).backward()
            found.append("")
        except ReplicaMismatchError as error:
            found.append(str(error).split("\n")[0])
        if rank == 0:
            optimizer.step()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("check", ["always", "first", "never"])
def test_a_skipped_step_is_noticed_under_always(check: str) -> None:
    expected = "parameter 'tokens.weight' is not the same on all ranks"
    first, second = get_pool(2).run(skips_a_step, check)
    assert first == second == ["", expected if check == "always" else ""]


def cut(rank: int, world_size: int, options: dict[str, Any], is_loaded: bool) -> str:
    """Ranks that would keep parts of different weights."""
    torch.manual_seed(rank)
    model = AttentionWithLoss().double()
    weights = attention_with_loss().state_dict()
    sptransform.parallelize(model, backend="eager", **options)
    if not is_loaded:
        return told(lambda: model(**token_inputs()))
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    return f"{float(model(**token_inputs())):.12f}"


CUT = {
    "ulysses": {"strategy": "ulysses", "shard_parameters": True},
    "megatron": {"strategy": "megatron", "inputs": token_inputs()},
    "megatron_at_first_call": {"strategy": "megatron"},
}


@pytest.mark.parametrize("options", tiered(list(CUT.values()), quick=[CUT["ulysses"]]), ids=str)
def test_weights_are_compared_before_they_are_cut(options: dict[str, Any]) -> None:
    (message,) = set(get_pool(2).run(cut, options, False))
    assert message.startswith("parameter '") and " more of " in message


@pytest.mark.slow
@pytest.mark.parametrize("options", [CUT["ulysses"], CUT["megatron"]], ids=str)
def test_weights_that_are_loaded_later_may_have_differed(options: dict[str, Any]) -> None:
    (loss,) = set(get_pool(2).run(cut, options, True))
    assert loss == f"{float(attention_with_loss()(**token_inputs())):.12f}"


def broadcast(rank: int, world_size: int) -> tuple[bool, str]:
    torch.manual_seed(rank)
    model = held()
    model.scale += rank
    model.tokens.weight.data = model.tokens.weight.data.T.contiguous().T  # strides of a transposed matrix
    mesh = init_device_mesh("cpu", (2, world_size // 2))
    sptransform.broadcast_parameters(model, mesh)
    equal = all(x.equal(y) for x, y in zip(model.state_dict().values(), held().state_dict().values(), strict=True))
    sptransform.parallelize(model, "ulysses", backend="eager", shard_parameters=True)
    with pytest.raises(UsageError) as error:
        sptransform.broadcast_parameters(model)
    return equal, str(error.value).split("\n")[0]


@pytest.mark.slow
def test_all_ranks_take_the_first_ones_weights() -> None:
    assert set(get_pool(4).run(broadcast)) == {(True, "each rank keeps a part of 'tokens.weight'")}


def rounded(rank: int, world_size: int) -> str:
    """Floating point inputs may differ by rounding, not by more."""

    class OfFeatures(AttentionWithLoss):
        def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            query = self.qkv(features).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(*query).transpose(1, 2).flatten(2)
            return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    torch.manual_seed(0)
    model = sptransform.parallelize(OfFeatures().double(), "ulysses", backend="eager")
    features, labels = torch.randn(2, 16, 16).double(), token_inputs()["labels"]
    for _ in range(4):
        assert model(features * (1 + 1e-7 * rank), labels).isfinite()
    return told(lambda: model(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(rank)).double(), labels))


@pytest.mark.slow
def scaled(rank: int, world_size: int) -> str:
    """An integer argument, of which a graph is compiled that takes any; then each rank has another."""

    class Scaled(AttentionWithLoss):
        def forward(self, tokens: torch.Tensor, labels: torch.Tensor, scale: int) -> torch.Tensor:
            return super().forward(tokens, labels) * scale

    torch.manual_seed(0)
    model = sptransform.parallelize(Scaled().double(), "ulysses", backend="eager")
    inputs = token_inputs()
    for scale in (3, 5, 7):
        assert model(**inputs, scale=scale).isfinite()
    return told(lambda: model(**inputs, scale=11 + rank))


@pytest.mark.slow
def test_integers_among_the_arguments_are_compared() -> None:
    for message in get_pool(2).run(scaled):
        assert "input 'scale' is not the same on all ranks" in message
        assert "rank 1: 12" in message


def test_rounding_of_inputs_is_no_mistake() -> None:
    (message,) = set(get_pool(2).run(rounded))
    assert message.startswith("input 'features' is not the same")


# --- the numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.uint8, torch.float32, torch.bfloat16, torch.complex64]
)
def test_a_checksum_sees_values_order_and_place(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(checksums, "_ROW", 4)
    x = (torch.arange(45) % 2).to(dtype).reshape(5, 9)
    others = [x.clone() for _ in range(45)]
    for at, other in enumerate(others):
        other.view(-1)[at] = ~x.view(-1)[at].bool()
    others += [x.flip(0), x.roll(16), x.T.contiguous(), torch.cat([x[1:], x[:1]])]
    sums = [int(checksum(each)) for each in (x, *others[:45])]
    assert len(set(sums)) == 46
    assert [int(checksum(each)) == sums[0] for each in others[45:]] == [
        each.reshape(-1).equal(x.reshape(-1)) for each in others[45:]
    ]
    assert int(checksum(x.T.contiguous().T)) == sums[0]


def test_long_inputs_and_expanded_ones_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_WHOLE", 100)
    monkeypatch.setattr(checksums, "_SOME", 50)
    mask = torch.ones(1, 1, 1, dtype=torch.bool).expand(64, 64, 64)
    assert int(checksum(mask, whole=False)) == int(checksum(torch.ones(50, dtype=torch.bool)))
    assert sample(torch.arange(128.0)).tolist() == list(range(0, 128, 2))
    assert sample(torch.tensor(3.0)).tolist() == [3.0] * 64
    assert sample(torch.empty(0)).tolist() == [0.0] * 64


def test_only_draws_make_the_generator_matter() -> None:
    nodes = torch.fx.Graph()
    x = nodes.placeholder("x")
    calls = {(0.0, True): False, (0.5, False): False, (0.5, True): True}
    for (p, train), expected in calls.items():
        assert replicas._draws(nodes.call_function(torch.ops.aten.dropout.default, (x, p, train))) == expected
    assert replicas._draws(nodes.call_function(torch.ops.aten.rand_like.default, (x,)))
    assert not replicas._draws(nodes.call_function(torch.ops.aten.relu.default, (x,)))


def test_what_arrives_late_is_judged_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a GPU, which this stands for: the numbers of a call go along with the next one."""

    class Event:
        def synchronize(self) -> None:
            pass

    on_host = checksums.Reading.of

    def on_device(exact: Any, sampled: Any) -> checksums.Reading:
        reading = on_host(exact, sampled)
        return checksums.Reading(reading.exact, reading.sampled, Event())  # type: ignore[arg-type]

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(3, dtype=torch.int64)
    graph.output(x)
    own = Replicas(graph, "first")
    monkeypatch.setattr(replicas, "Reading", type("Late", (), {"of": staticmethod(on_device)}))
    calls = [torch.arange(3) + i for i in range(3)]
    found = [own.facts([each]).all for each in calls]
    assert found[0] == ()
    assert [facts[0].exact for facts in found[1:]] == [int(checksum(each)) for each in calls[:2]]


def test_numbers_that_are_not_finite_are_compared_too() -> None:
    nan, inf = float("nan"), float("inf")

    def differ(*rows: tuple[float, ...]) -> bool:
        facts = {rank: Facts((Fact("input", "x", 0, row * 4),)) for rank, row in enumerate(rows)}
        return mismatch(facts) is not None

    assert not differ((nan, 1.0), (nan, 1.0)) and not differ((inf, 1.0), (inf, 1.001))
    assert differ((nan, 1.0), (1.0, 1.0)) and differ((inf, 1.0), (-inf, 1.0)) and differ((1.0, 1.0), (1.0, 1.1))


def test_a_rank_that_compiles_alone_is_not_compared() -> None:
    own = Fact("parameter", "w", 1), Fact("input", "x", 3)
    assert mismatch({0: Facts(own[1:]), 1: Facts(own)}) is None
    assert mismatch({0: Facts(own[1:]), 1: Facts(own), 2: Facts((Fact("parameter", "w", 2),))}) is not None
