"""Every wrong request, as a table: a named error, the same on every rank, before any collective, the module untouched.

The messages are golden texts, a file for each way to be wrong.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import sptransform
from sptransform import USP, AllGatherKV, Auto, Ring, Ulysses, UsageError
from tests.support.collective_counts import CountCollectives
from tests.support.gloo_pool import get_pool
from tests.support.golden import Golden
from tests.support.models import Inputs
from tests.support.tiny import SEQ_LEN, WIDTH, AttentionWithLoss, attention_with_loss, token_inputs

pytestmark = pytest.mark.timeout(180)


# --- models ---------------------------------------------------------------------------------------------------


class WithoutAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.up(states)).sum()


class BrokenBeforeTheLoss(AttentionWithLoss):
    """The part after the graph break has no attention."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x


class Scattered(AttentionWithLoss):
    def __init__(self) -> None:
        super().__init__()
        self.head.to("meta")


def without_attention() -> nn.Module:
    return WithoutAttention().double()


def state_inputs() -> Inputs:
    return {"states": torch.ones(2, SEQ_LEN, WIDTH, dtype=torch.float64)}


def compiled_before() -> nn.Module:
    model = attention_with_loss()
    model.compile(backend="eager")
    return model


# --- the table ------------------------------------------------------------------------------------------------


def parallel(model: Any, **arguments: Any) -> Any:
    return sptransform.parallelize(model, **{"strategy": "ulysses", "backend": "aot_eager"} | arguments)


def plain(model: nn.Module, inputs: Inputs | None = None, **given: Any) -> None:
    torch.compile(model, backend="sptransform", options={"backend": "aot_eager"} | given)(**(inputs or token_inputs()))


def dims(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "sp", "tp")[: len(sizes)])


def split_by_ddp(model: nn.Module) -> None:
    plain(DistributedDataParallel(model))


@dataclass(frozen=True)
class Bad:
    """A wrong request: what is done to a model. Only of a model that ``runs`` can be asked that it still does."""

    call: Callable[[Any], Any]
    make: Callable[[], Any] = attention_with_loss
    inputs: Callable[[], Inputs] = token_inputs
    runs: bool = True


TABLE: dict[str, Bad] = {
    # strategies
    "strategy_unknown": Bad(lambda m: parallel(m, strategy="ulises")),
    "strategy_chosen_without_inputs": Bad(lambda m: parallel(m, strategy=Auto(megatron=True))),
    "strategy_type": Bad(lambda m: parallel(m, strategy=3)),
    "strategy_class": Bad(lambda m: parallel(m, strategy=Ulysses)),
    "strategy_split": Bad(lambda m: parallel(m, strategy=Ulysses(split="tokens"))),
    "strategy_nothing_to_split": Bad(
        lambda m: parallel(m, strategy=Ulysses("batch"))(**{name: x[:1] for name, x in token_inputs().items()})
    ),
    "strategy_layout": Bad(lambda m: parallel(m, strategy=Ring(layout="x"))),
    "strategy_block": Bad(lambda m: parallel(m, strategy=Ring("striped", block=0))),
    "strategy_block_type": Bad(lambda m: parallel(m, strategy=USP(layout="striped", block="128"))),
    "strategy_block_of_zigzag": Bad(lambda m: parallel(m, strategy=AllGatherKV(block=128))),
    "strategy_kv": Bad(lambda m: parallel(m, strategy=Ring(kv="x"))),
    "strategy_regather": Bad(lambda m: parallel(m, strategy=AllGatherKV(regather=1))),
    "strategy_degree": Bad(lambda m: parallel(m, strategy=USP(0))),
    "strategy_degree_type": Bad(lambda m: parallel(m, strategy=USP("2"))),
    "strategy_ranks": Bad(lambda m: parallel(m, strategy=USP(ulysses=3))),
    "plain_strategy_ranks": Bad(lambda m: plain(m, strategy=USP(ulysses=3))),
    # meshes
    "mesh_type": Bad(lambda m: parallel(m, mesh=[0, 1])),
    "mesh_two_dims": Bad(lambda m: parallel(m, mesh=dims(2, 1))),
    "mesh_two_dims_ring": Bad(lambda m: parallel(m, strategy="ring", mesh=dims(2, 1))),
    "mesh_two_dims_allgather": Bad(lambda m: parallel(m, strategy="allgather", mesh=dims(2, 1))),
    "mesh_three_dims": Bad(lambda m: parallel(m, strategy="usp", mesh=dims(2, 1, 1))),
    "mesh_dims_of_usp": Bad(lambda m: parallel(m, strategy=USP(ulysses=2, ring=1), mesh=dims(2, 1))),
    "mesh_of_others": Bad(lambda m: parallel(m, mesh=DeviceMesh("cpu", [1 - dist.get_rank()]))),
    "mesh_device": Bad(lambda m: parallel(m, mesh=DeviceMesh("meta", [0, 1]))),
    # options
    "option_backend": Bad(lambda m: parallel(m, backend="gcc")),
    "option_own_backend": Bad(lambda m: parallel(m, backend="sptransform")),
    "option_outputs": Bad(lambda m: parallel(m, outputs="gathered")),
    "option_outputs_after_break": Bad(lambda m: parallel(m, outputs="local", fullgraph=False)),
    "option_grad_sync": Bad(lambda m: parallel(m, grad_sync="yes")),
    "option_strict": Bad(lambda m: parallel(m, strict=1)),
    "option_loss_chunk": Bad(lambda m: parallel(m, loss_chunk=0)),
    "option_loss_chunk_type": Bad(lambda m: parallel(m, loss_chunk=True)),
    "option_fullgraph": Bad(lambda m: parallel(m, fullgraph=None)),
    "option_check_timeout": Bad(lambda m: parallel(m, check_timeout=0)),
    "option_check_timeout_type": Bad(lambda m: parallel(m, check_timeout="5 s")),
    "option_check_replicas": Bad(lambda m: parallel(m, check_replicas="sometimes")),
    "plain_option_unknown": Bad(lambda m: plain(m, strategie="ulysses")),
    "plain_strategy": Bad(lambda m: plain(m, strategy="ulises")),
    "plain_mesh": Bad(lambda m: plain(m, mesh="sp")),
    # sequences
    "sequence_dims_type": Bad(lambda m: parallel(m, sequence_dims=["tokens"])),
    "sequence_dims_value": Bad(lambda m: parallel(m, sequence_dims={"tokens": "1"})),
    "sequence_dims_no_input": Bad(lambda m: parallel(m, sequence_dims={"token": 1})(**token_inputs())),
    "sequence_dims_no_dim": Bad(lambda m: parallel(m, sequence_dims={"tokens": 2})(**token_inputs())),
    "no_attention": Bad(lambda m: parallel(m)(**state_inputs()), without_attention, state_inputs),
    "plain_no_attention": Bad(lambda m: plain(m, state_inputs()), without_attention, state_inputs),
    # modules
    "module_function": Bad(parallel, lambda: torch.sin, runs=False),
    "module_class": Bad(parallel, lambda: nn.Linear, runs=False),
    "module_compiled": Bad(parallel, compiled_before),
    "module_parallelized": Bad(lambda m: parallel(parallel(m))),
    "module_optimized": Bad(lambda m: parallel(torch.compile(m, backend="eager"))),
    "module_device": Bad(parallel, lambda: attention_with_loss().to("meta"), runs=False),
    "module_devices": Bad(parallel, Scattered, runs=False),
    "plain_ddp": Bad(split_by_ddp),
}
# An error in a call comes after the module was compiled in place; one before must leave it as it was.
COMPILED = {
    "module_compiled",
    "module_parallelized",
    "no_attention",
    "sequence_dims_no_dim",
    "sequence_dims_no_input",
    "strategy_nothing_to_split",
}


def refused(rank: int, world_size: int, names: list[str]) -> dict[str, str]:
    """The message of each, once all that must hold of it does."""
    return {name: refusal(name) for name in names}


def refusal(name: str) -> str:
    bad = TABLE[name]
    torch._dynamo.reset()
    model = bad.make()
    before = copy.deepcopy(model)
    starts_collectives = name == "plain_ddp"  # DDP's own, when it is made
    with CountCollectives() as counted:
        try:
            bad.call(model)
        except UsageError as error:
            message = str(error)
        except BackendCompilerFailed as error:  # a plain backend's errors are wrapped by Dynamo
            assert name.startswith("plain")
            assert type(error.inner_exception) is UsageError, name
            message = str(error.inner_exception)
        else:
            raise AssertionError(f"{name} was not refused")
    assert starts_collectives or not counted.collectives, name
    if isinstance(model, nn.Module):
        assert name in COMPILED or model._compiled_call_impl is None, name
        assert type(model) is type(before)
        expected = before.state_dict()
        assert list(model.state_dict()) == list(expected)
        for key, value in model.state_dict().items():
            assert value.device == expected[key].device and value.dtype == expected[key].dtype
            if value.device.type != "meta":
                torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
        if bad.runs:
            inputs = bad.inputs()
            torch.testing.assert_close(model._call_impl(**inputs), before(**inputs), rtol=0, atol=0)
    return message


def test_every_wrong_request_is_refused_alike_on_every_rank(golden: Golden) -> None:
    first, second = get_pool(2).run(refused, list(TABLE), timeout=150)
    for name, message in first.items():
        if name != "mesh_of_others":
            assert second[name] == message, name
        if name.endswith("backend"):  # which backends there are depends on what is installed
            message = message.split("\n  fix: one of ")[0] + "\n  fix: one of ..."
        golden.check(f"bad_input_{name}", message=message)


def test_every_message_says_what_was_found_and_what_would_fix_it() -> None:
    for name in TABLE:
        text = (Golden.__init__.__globals__["FOLDER"] / f"bad_input_{name}.txt").read_text()
        assert "\n  found: " in text and "\n  fix: " in text, name


def refused_and_then_right(rank: int, world_size: int) -> list[float]:
    """Ranks that were all refused are still in step."""
    for name in ("no_attention", "sequence_dims_no_input", "strategy_unknown"):
        refusal(name)
    losses = []
    for _ in range(2):
        loss = parallel(attention_with_loss())(**token_inputs())
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


def test_after_a_refusal_the_right_request_is_served() -> None:
    expected = float(attention_with_loss()(**token_inputs()).detach())
    for losses in get_pool(2).run(refused_and_then_right):
        assert losses == [pytest.approx(expected, rel=1e-12)] * 2


def breaks_before_the_loss(rank: int, world_size: int) -> str:
    """Its first part has run, with collectives, when the second is refused."""
    model = parallel(BrokenBeforeTheLoss().double(), fullgraph=False)
    with pytest.raises(UsageError) as error:
        model(**token_inputs())
    return str(error.value)


def test_a_part_without_attention_asks_for_sequence_dims(golden: Golden) -> None:
    (message,) = set(get_pool(2).run(breaks_before_the_loss))
    golden.check("bad_input_part_without_attention", message=message)


def through_ddp(rank: int, world_size: int) -> float:
    model = DistributedDataParallel(parallel(attention_with_loss()))
    loss = model(**token_inputs())
    loss.backward()
    return float(loss.detach())


def test_ddp_around_a_parallelized_module_is_what_the_error_says_it_is() -> None:
    expected = float(attention_with_loss()(**token_inputs()).detach())
    assert get_pool(2).run(through_ddp) == [pytest.approx(expected, rel=1e-12)] * 2


def test_no_process_group(golden: Golden) -> None:
    model = attention_with_loss()
    with mock.patch.dict(os.environ, clear=False), pytest.raises(UsageError) as error:
        parallel(model)
    golden.check("bad_input_no_process_group", message=str(error.value))
    assert model._compiled_call_impl is None
