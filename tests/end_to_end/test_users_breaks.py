"""Graph breaks, and the recompile limit: right, or an error; never unsharded without a word."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported

import sptransform
from sptransform import UsageError
from tests.support.collective_counts import CountCollectives
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64, VOCAB, CausalTransformer, Inputs, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)

# --- graph breaks ---------------------------------------------------------------------------------------------


class Broken(CausalTransformer):
    """Breaks the graph between its two blocks; each part has an attention."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        x = self.blocks[1](x)
        logits = self.head(self.norm(x))[:, :-1]
        return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


class BrokenBeforeTheLoss(Broken):
    """The part after the break has no attention."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))[:, :-1]
        torch._dynamo.graph_break()
        return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def broken(make: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make(layers=2 if issubclass(make, Broken) else 1).double()


def inputs() -> Inputs:
    return build("sdpa_transformer")[1]


def step(rank: int, world_size: int, make: type[nn.Module], plain: bool, **options: object) -> tuple[Result, int]:
    model = broken(make)
    if plain:
        compiled = torch.compile(model, backend="sptransform", options={"backend": "aot_eager"} | options)
    else:
        compiled = sptransform.parallelize(model, "ulysses", backend="aot_eager", fullgraph=False, **options)
    with CountCollectives() as counted:
        result = run_one_device(compiled, inputs())
    grads = {name.removeprefix("_orig_mod."): grad for name, grad in result.grads.items()}
    return Result(result.loss, grads), sum(c.name == "all_to_all_single" for c in counted.collectives)


@pytest.mark.parametrize("plain", tiered([False, True], quick=[True]), ids=["parallelize", "backend"])
def test_parts_with_attention_are_sharded_each_and_hand_over_whole_tensors(plain: bool) -> None:
    reference = run_one_device(broken(Broken), inputs())
    for result, num_exchanges in get_pool(2).run(step, Broken, plain):
        assert_equal_to_one_device(reference, result, FLOAT64)
        assert num_exchanges == 8


def refused(rank: int, world_size: int) -> str:
    with pytest.raises(UsageError) as error:
        step(rank, world_size, BrokenBeforeTheLoss, plain=False)
    return str(error.value)


def test_a_part_without_attention_is_refused_by_name() -> None:
    for message in get_pool(2).run(refused):
        assert "sequence_dims" in message


def refuses_sharded_outputs(rank: int, world_size: int) -> list[str]:
    messages = []
    for outputs in ("dtensor", "local"):
        model = broken(Broken)
        with pytest.raises(UsageError) as error:
            sptransform.parallelize(model, "ulysses", fullgraph=False, outputs=outputs)
        assert model._compiled_call_impl is None
        messages.append(str(error.value))
    return messages


def test_sharded_outputs_and_graph_breaks_exclude_each_other() -> None:
    for messages in get_pool(2).run(refuses_sharded_outputs):
        assert all("must be whole" in message for message in messages)


# --- never unsharded without a word ---------------------------------------------------------------------------


class Times(CausalTransformer):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, number: float) -> torch.Tensor:
        return super().forward(input_ids, labels) * number


class Noted(Times):
    """Between graph breaks a part without tensors, which no backend compiles."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.noted: list[float] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, number: float) -> torch.Tensor:
        loss = CausalTransformer.forward(self, input_ids, labels)
        torch._dynamo.graph_break()
        self.noted.append(number * 2)
        return note(self, number, loss)


def note(model: Noted, number: float, loss: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    model.noted.append(math.exp(number))
    return loss


def exceeds_the_limit(rank: int, world_size: int, fullgraph: bool, model_type: type[Times] = Times) -> int:
    """How many numbers ran before the limit stopped it."""
    model = broken(model_type)
    sptransform.parallelize(model, "ulysses", backend="aot_eager", fullgraph=fullgraph)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for at, number in enumerate((0.5, 0.25, 0.125, 1.5)):
            with CountCollectives() as counted:
                try:
                    model(**inputs(), number=number)
                except UsageError as error:
                    assert "recompile_limit" in str(error)
                    return at
            assert counted.collectives
    return 4


@pytest.mark.parametrize("fullgraph", tiered([True, False], quick=[False]))
def test_the_recompile_limit_is_an_error(fullgraph: bool) -> None:
    assert get_pool(2).run(exceeds_the_limit, fullgraph) == [2, 2]


def test_the_recompile_limit_holds_for_parts_without_tensors() -> None:
    assert get_pool(2).run(exceeds_the_limit, False, Noted) == [2, 2]


def kept_from_compiling(rank: int, world_size: int) -> str:
    model = broken(CausalTransformer)
    sptransform.parallelize(model, "ulysses", backend="aot_eager")
    with torch.compiler.set_stance("force_eager"), pytest.raises(UsageError) as error:
        model(**inputs())
    return str(error.value)


def test_a_model_that_was_not_compiled_is_an_error() -> None:
    for message in get_pool(2).run(kept_from_compiling):
        assert "not sharded" in message


class Twice(nn.Module):
    """Something around a parallelized model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 2 * self.model(input_ids, labels)


def compiled_around(rank: int, world_size: int) -> tuple[torch.Tensor, int, str]:
    """The loss and all-to-alls where the user compiles around a parallelized model, and the error of a whole graph."""
    model = Twice(broken(CausalTransformer))
    sptransform.parallelize(model.model, "ulysses", backend="aot_eager")
    with CountCollectives() as counted:
        loss = torch.compile(model, backend="aot_eager")(**inputs())
    torch._dynamo.reset()  # what was compiled with breaks would serve the next call
    with pytest.raises(Unsupported) as error:
        torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs())
    return loss.detach(), len(counted.collectives), str(error.value)


def test_compiling_around_a_parallelized_model_leaves_it_sharded() -> None:
    reference = Twice(broken(CausalTransformer))(**inputs()).detach()
    for loss, num_collectives, message in get_pool(2).run(compiled_around):
        torch.testing.assert_close(loss, reference, rtol=FLOAT64, atol=0)
        assert num_collectives > 0
        assert "a parallelized model is compiled by itself" in message


def copied(rank: int, world_size: int) -> tuple[torch.Tensor, int]:
    model = broken(CausalTransformer)
    sptransform.parallelize(model, "ulysses", backend="aot_eager")(**inputs())
    with CountCollectives() as counted:
        loss = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)(**inputs())
    return loss.detach(), len(counted.collectives)


def test_a_copy_is_the_users_to_compile() -> None:
    reference = broken(CausalTransformer)(**inputs()).detach()
    for loss, num_collectives in get_pool(2).run(copied):
        torch.testing.assert_close(loss, reference, rtol=FLOAT64, atol=0)
        assert num_collectives == 0
