"""The counting of collectives: what runs is counted once, compiled or not, in the direction where it runs."""

import pytest
import torch
import torch.distributed as dist

from tests.support.collective_counts import Collective, CountCollectives, num_by_name
from tests.support.gloo_pool import get_pool
from tests.support.tiers import INDUCTOR

pytestmark = pytest.mark.timeout(120)
functional = torch.ops._c10d_functional


def exchange(x: torch.Tensor) -> torch.Tensor:
    """An all-to-all of 4 rows, then a gather of the result."""
    x = functional.wait_tensor(functional.all_to_all_single(x * 2, [2, 2], [2, 2], "0"))
    return functional.wait_tensor(functional.all_gather_into_tensor(x, 2, "0"))


def count_exchange(rank: int, world_size: int, backend: str | None) -> tuple[list[Collective], ...]:
    """The collectives of `exchange`, forward and backward."""
    run = exchange if backend is None else torch.compile(exchange, backend=backend, fullgraph=True)
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    with CountCollectives() as forward:
        loss = run(x).sum()
    with CountCollectives() as backward:
        loss.backward()
    return forward.collectives, backward.collectives


def count_inside_an_op(rank: int, world_size: int) -> list[Collective]:
    """The collectives of an op whose kernel holds one."""

    @torch.library.custom_op("sptransform::counted_for_a_test", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        return functional.wait_tensor(functional.all_reduce(x, "sum", "0"))

    with CountCollectives() as counted:
        total = op(torch.ones(3))
    assert total.tolist() == [2.0, 2.0, 2.0]
    return counted.collectives


def count_unequal_splits(rank: int, world_size: int) -> list[Collective]:
    """Rank 0 keeps 3 rows and sends 1, rank 1 sends 2 and keeps none."""
    input_splits, output_splits = ([3, 1], [3, 2]) if rank == 0 else ([2, 0], [1, 0])
    x = torch.ones(sum(input_splits), 5)
    with CountCollectives() as counted:
        functional.wait_tensor(
            functional.all_to_all_single(x, output_splits, input_splits, dist.group.WORLD.group_name)
        )
    return counted.collectives


@pytest.mark.parametrize("backend", [None, "aot_eager", INDUCTOR])
def test_each_direction_is_counted_once(backend: str | None) -> None:
    for forward, backward in get_pool(2).run(count_exchange, backend, timeout=100):
        assert num_by_name(forward) == {"all_to_all_single": 1, "all_gather_into_tensor": 1}
        assert num_by_name(backward) == {"reduce_scatter_tensor": 1, "all_to_all_single": 1}
        exchanged, gathered = forward
        assert exchanged.shape == (4, 3)
        assert exchanged.input_splits == exchanged.output_splits == (2, 2)
        assert (exchanged.input_bytes, exchanged.sent_bytes) == (96, 48)
        assert (gathered.input_bytes, gathered.sent_bytes) == (96, 96)


def test_what_stays_on_the_rank_is_not_sent() -> None:
    (first,), (second,) = get_pool(2).run(count_unequal_splits, timeout=30)
    assert (first.input_bytes, first.sent_bytes) == (80, 20)
    assert (second.input_bytes, second.sent_bytes) == (40, 40)


def test_collectives_inside_our_ops_are_counted() -> None:
    for collectives in get_pool(2).run(count_inside_an_op, timeout=30):
        assert num_by_name(collectives) == {"all_reduce": 1}
