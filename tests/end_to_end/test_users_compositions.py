"""Several models, several groups, data parallelism over sequence parallelism."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sptransform
from sptransform import UsageError
from tests.support.collective_counts import CountCollectives
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64, Inputs, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)


def parallel(model: nn.Module, strategy: str = "ulysses", **options: Any) -> nn.Module:
    return sptransform.parallelize(model, strategy, **{"backend": "aot_eager"} | options)


def assert_equals_one_device(name: str, result: Result) -> None:
    assert_equal_to_one_device(run_one_device(*build(name, layers=1)), result, FLOAT64)


# --- two models in one process --------------------------------------------------------------------------------


def by_turns(rank: int, world_size: int, meshes: str) -> list[tuple[Result, set[int]]]:
    """Two steps of each of two models by turns, and the sizes of the groups that communicated."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("far", "near"))
    first, second = (mesh["near"], mesh["far"]) if meshes == "different" else (mesh["near"], mesh["near"])
    models = [(build("bert", layers=1), first), (build("sdpa_transformer", layers=1), second)]
    built = [(parallel(model, mesh=sub), inputs) for (model, inputs), sub in models]
    results = []
    for _ in range(2):
        for model, inputs in built:
            model.zero_grad()
            with CountCollectives() as counted:
                result = run_one_device(model, inputs)
            results.append((result, {collective.group_size for collective in counted.collectives}))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("meshes", ["same", "different"])
def test_two_models_by_turns(meshes: str) -> None:
    for results in get_pool(4).run(by_turns, meshes, timeout=180):
        for (result, group_sizes), name in zip(results, ["bert", "sdpa_transformer"] * 2, strict=True):
            assert_equals_one_device(name, result)
            assert group_sizes == {2}


def each_its_own(rank: int, world_size: int) -> tuple[str, Result]:
    """Half of the ranks train one model, half another: they need not be in step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("job", "sp"))
    name = ("bert", "sdpa_transformer")[mesh["job"].get_local_rank()]
    model, inputs = build(name, layers=1)
    parallel(model, mesh=mesh["sp"])
    for _ in range(1 + rank // 2):
        model.zero_grad()
        result = run_one_device(model, inputs)
    return name, result


@pytest.mark.slow
def test_groups_with_a_model_each() -> None:
    results = get_pool(4).run(each_its_own, timeout=180)
    assert [name for name, _ in results] == ["bert", "bert", "sdpa_transformer", "sdpa_transformer"]
    for name, result in results:
        assert_equals_one_device(name, result)


# --- data parallelism over sequence parallelism ---------------------------------------------------------------

BATCH = 4


def global_batch() -> Inputs:
    """As many labels in each half, so that the mean over the whole is the mean of the halves' means."""
    ids = build("sdpa_transformer", batch=BATCH)[1]["input_ids"]
    return {"input_ids": ids, "labels": ids}


def replicated(rank: int, world_size: int, order: str, num_micro: int, strategy: str) -> Result:
    """A step on this rank's half of the batch, in micro-batches; its loss and the gradients DDP leaves."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    group = mesh["dp"].get_group()
    model, _ = build("sdpa_transformer", layers=1)
    if order == "parallelize first":
        wrapped = DistributedDataParallel(parallel(model, strategy, mesh=mesh["sp"]), process_group=group)
    else:
        wrapped = DistributedDataParallel(model, process_group=group)
        parallel(wrapped.module, strategy, mesh=mesh["sp"])
    mine = {name: x.chunk(2)[mesh["dp"].get_local_rank()] for name, x in global_batch().items()}
    batches = [{name: x.chunk(num_micro)[i] for name, x in mine.items()} for i in range(num_micro)]
    total = torch.zeros((), dtype=torch.float64)
    for i, batch in enumerate(batches):
        wrapped.require_backward_grad_sync = i == num_micro - 1  # what no_sync() does
        with CountCollectives() as counted:
            loss = wrapped(**batch) / num_micro
        sent_by_attention = {"ring": "hop", "ulysses": "all_to_all_single"}[strategy]
        assert any(collective.name == sent_by_attention for collective in counted.collectives)
        loss.backward()
        total += loss.detach()
    return Result(total, {name: p.grad.clone() for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("order", "num_micro", "strategy"),
    tiered(
        [
            ("parallelize first", 1, "ulysses"),
            ("parallelize first", 2, "ring"),
            ("its module after", 1, "ring"),
            ("its module after", 2, "ulysses"),
        ],
        quick=[("its module after", 2, "ulysses")],
    ),
)
def test_ddp_over_dp_x_sp_is_one_device_with_the_global_batch(order: str, num_micro: int, strategy: str) -> None:
    reference = run_one_device(build("sdpa_transformer", layers=1)[0], global_batch())
    results = get_pool(4).run(replicated, order, num_micro, strategy, timeout=180)
    assert torch.equal(results[0].loss, results[1].loss) and torch.equal(results[2].loss, results[3].loss)
    loss = (results[0].loss + results[2].loss) / 2
    for result in results:
        assert_equal_to_one_device(reference, Result(loss, result.grads), FLOAT64)


STEPS = 3


def steps(model: nn.Module, batches: list[Inputs]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()


def batches() -> list[Inputs]:
    return [{name: x.roll(step, 1) for name, x in global_batch().items()} for step in range(STEPS)]


def trained_by_ddp(rank: int, world_size: int, strategy: str) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model = parallel(build("sdpa_transformer", layers=1)[0], strategy, mesh=mesh["sp"])
    wrapped = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    own = mesh["dp"].get_local_rank()
    steps(wrapped, [{name: x.chunk(2)[own] for name, x in batch.items()} for batch in batches()])
    return {name: x.detach() for name, x in model.named_parameters()}


@pytest.mark.slow
def test_three_steps_of_ddp_over_dp_x_sp() -> None:
    model, _ = build("sdpa_transformer", layers=1)
    steps(model, batches())
    for parameters in get_pool(4).run(trained_by_ddp, "ring", timeout=180):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name], parameter.detach(), rtol=1e-9, atol=1e-9, msg=name)


def parallelizes_ddp(rank: int, world_size: int) -> str:
    with pytest.raises(UsageError) as error:
        parallel(DistributedDataParallel(build("sdpa_transformer", layers=1)[0]))
    return str(error.value)


def test_parallelizing_what_ddp_wraps_is_asked_for() -> None:
    """torch.compile cannot see through DDP's own forward."""
    for message in get_pool(2).run(parallelizes_ddp):
        assert "DistributedDataParallel" in message and "module" in message


# --- FSDP2 ----------------------------------------------------------------------------------------------------


def fully_sharded(rank: int, world_size: int, case: str) -> list[Result]:
    """Three steps on this rank's half of the batch under FSDP2, and the gradients of each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model, _ = build("sdpa_transformer", layers=1)
    own = {key: x.chunk(2)[mesh["dp"].get_local_rank()] for key, x in global_batch().items()}
    if case == "megatron":  # parameters cut over sp are cut once more over dp
        parallel(model, "megatron", mesh=mesh["sp"], inputs=own)
        fully_shard(model, mesh=mesh["dp"])
    else:
        parallel(model, mesh=mesh["sp"], grad_sync=case == "complete gradients")
        fully_shard(model, mesh=mesh["dp", "sp"]._flatten("all"))
        if case == "terms of gradients":  # summed over sp, averaged over dp
            model.set_gradient_divide_factor(2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    results = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**own)
        loss.backward()
        grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        whole = loss.detach() / 2
        dist.all_reduce(whole, group=mesh["dp"].get_group())
        results.append(Result(whole, grads))
        optimizer.step()
    return results


@pytest.mark.parametrize(
    "case", tiered(["complete gradients", "terms of gradients", "megatron"], quick=["terms of gradients"])
)
def test_fsdp_around_a_parallelized_model(case: str) -> None:
    model, _ = build("sdpa_transformer", layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        expected.append(run_one_device(model, global_batch()))
        optimizer.step()
    for results in get_pool(4).run(fully_sharded, case, timeout=180):
        for step, (result, reference) in enumerate(zip(results, expected, strict=True)):
            assert_equal_to_one_device(reference, result, FLOAT64 if step == 0 else 1e-10)
