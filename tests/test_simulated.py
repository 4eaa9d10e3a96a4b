"""The simulated ranks: the value and gradient of each functional collective, against its definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalIntNode

from tests.support.simulated import from_ranks, per_rank, simulate, to_ranks

pytestmark = pytest.mark.timeout(60)
functional = torch.ops._c10d_functional
NUM_RANKS = 4
Ranks = list[torch.Tensor]


def run_collective(collective: Callable[[Any, str], Any], inputs: Ranks) -> tuple[Ranks, Ranks, Ranks]:
    """A collective's outputs, the gradients fed into them, and the gradients that reach its inputs."""
    with simulate(NUM_RANKS):
        x = from_ranks(lambda rank: inputs[rank], NUM_RANKS, requires_grad=True)
        y = functional.wait_tensor(collective(x, dist.group.WORLD.group_name))
        outputs = per_rank(y)
        cotangents = [torch.randn(output.shape, dtype=output.dtype) for output in outputs]
        (y * from_ranks(lambda rank: cotangents[rank], NUM_RANKS)).sum().backward()
        return outputs, cotangents, per_rank(x.grad)


def random_inputs(rows: list[int]) -> Ranks:
    torch.manual_seed(0)
    return [torch.randn(num_rows, 3, dtype=torch.float64) for num_rows in rows]


def exchanged(tensors: Ranks, rows: list[list[int]]) -> Ranks:
    """What each rank holds after rank `i` has sent `rows[i][j]` rows to rank `j`."""
    pieces = [tensor.split(sizes) for tensor, sizes in zip(tensors, rows, strict=True)]
    return [torch.cat([piece[receiver] for piece in pieces]) for receiver in range(NUM_RANKS)]


def assert_ranks_equal(got: Ranks, expected: Ranks) -> None:
    for got_tensor, expected_tensor in zip(got, expected, strict=True):
        torch.testing.assert_close(got_tensor, expected_tensor)


def test_all_reduce() -> None:
    inputs = random_inputs([8] * NUM_RANKS)
    outputs, cotangents, grads = run_collective(
        lambda x, group: functional.all_reduce(x, "sum", group), inputs
    )
    assert_ranks_equal(outputs, [sum(inputs)] * NUM_RANKS)
    assert_ranks_equal(grads, [sum(cotangents)] * NUM_RANKS)


def test_all_gather() -> None:
    inputs = random_inputs([2] * NUM_RANKS)
    outputs, cotangents, grads = run_collective(
        lambda x, group: functional.all_gather_into_tensor(x, NUM_RANKS, group), inputs
    )
    assert_ranks_equal(outputs, [torch.cat(inputs)] * NUM_RANKS)
    assert_ranks_equal(grads, list(sum(cotangents).chunk(NUM_RANKS)))


def test_reduce_scatter() -> None:
    inputs = random_inputs([8] * NUM_RANKS)
    outputs, cotangents, grads = run_collective(
        lambda x, group: functional.reduce_scatter_tensor(x, "sum", NUM_RANKS, group), inputs
    )
    assert_ranks_equal(outputs, list(sum(inputs).chunk(NUM_RANKS)))
    assert_ranks_equal(grads, [torch.cat(cotangents)] * NUM_RANKS)


def test_all_to_all() -> None:
    inputs, splits = random_inputs([8] * NUM_RANKS), [2] * NUM_RANKS
    outputs, cotangents, grads = run_collective(
        lambda x, group: functional.all_to_all_single(x, splits, splits, group), inputs
    )
    assert_ranks_equal(outputs, exchanged(inputs, [splits] * NUM_RANKS))
    assert_ranks_equal(grads, exchanged(cotangents, [splits] * NUM_RANKS))


def test_all_to_all_with_splits_that_differ_between_ranks() -> None:
    rows = [[1, 2, 0, 1], [2, 1, 1, 0], [3, 0, 1, 1], [0, 1, 2, 2]]
    received = [list(column) for column in zip(*rows, strict=True)]
    inputs = random_inputs([sum(sizes) for sizes in rows])

    def collective(x: torch.Tensor, group: str) -> torch.Tensor:
        # The k-th split is one number for each rank, so it is a symbolic integer that holds them all.
        input_splits = [torch.SymInt(LocalIntNode(dict(enumerate(column)))) for column in received]
        output_splits = [torch.SymInt(LocalIntNode(dict(enumerate(column)))) for column in rows]
        return functional.all_to_all_single(x, output_splits, input_splits, group)

    outputs, cotangents, grads = run_collective(collective, inputs)
    assert_ranks_equal(outputs, exchanged(inputs, rows))
    assert_ranks_equal(grads, exchanged(cotangents, received))


def test_the_group_ends_with_the_block() -> None:
    for num_ranks in (2, 3):
        with simulate(num_ranks):
            assert dist.get_world_size() == num_ranks
            assert len(per_rank(to_ranks(torch.zeros(1), num_ranks))) == num_ranks
        assert not dist.is_initialized()


def test_a_plain_tensor_is_refused_as_per_rank_values() -> None:
    with pytest.raises(TypeError, match="same on all ranks"):
        per_rank(torch.zeros(1))
