"""The worker pool itself: every rank's result, and every kind of failure with its ranks named."""

import os
import pickle
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.gloo_pool import WorkerDied, WorkerError, WorkerTimeout, get_pool

pytestmark = pytest.mark.timeout(60)


def summed_rank(rank: int, world_size: int, offset: float) -> torch.Tensor:
    """Each rank's number and the sum over all ranks, through the group."""
    total = torch.tensor(rank + offset, dtype=torch.float64)
    dist.all_reduce(total)
    return torch.stack([torch.tensor(float(rank), dtype=torch.float64), total])


def fail_on(rank: int, world_size: int, failing: int) -> None:
    """One rank raises while the others wait for it in a collective."""
    if rank == failing:
        raise ValueError("this rank only")
    dist.barrier()


def sleep_on(rank: int, world_size: int, sleeping: int) -> None:
    """One rank does not answer."""
    if rank == sleeping:
        time.sleep(60)


def exit_on(rank: int, world_size: int, exiting: int) -> None:
    """One rank's process ends with no exception while the others wait for it."""
    if rank == exiting:
        os.write(2, b"last words\n")
        os._exit(3)
    dist.barrier()


def exit_after_the_answer(rank: int, world_size: int) -> None:
    """The process ends when it has answered."""
    threading.Timer(0.2, os._exit, [4]).start()


def random_number(rank: int, world_size: int) -> float:
    """The first number of a reseeded generator."""
    return torch.rand(()).item()


def assert_usable() -> None:
    """The pool answers, and its ranks are in step with one another."""
    results = get_pool(2).run(summed_rank, 10.0, timeout=30)
    torch.testing.assert_close(results[0], torch.tensor([0.0, 21.0], dtype=torch.float64))
    torch.testing.assert_close(results[1], torch.tensor([1.0, 21.0], dtype=torch.float64))


def test_a_result_from_each_rank() -> None:
    assert_usable()


def test_one_pool_for_each_world_size() -> None:
    assert get_pool(2) is get_pool(2)
    assert get_pool(1).run(summed_rank, 5.0, timeout=30)[0].tolist() == [0.0, 5.0]


def test_calls_start_from_the_same_random_state() -> None:
    first, second = (get_pool(2).run(random_number, timeout=30) for _ in range(2))
    assert first == second


def test_an_error_names_its_rank_and_keeps_its_traceback() -> None:
    with pytest.raises(WorkerError, match="rank 1 of 2 raised ValueError: this rank only") as caught:
        get_pool(2).run(fail_on, 1, timeout=30)
    assert caught.value.ranks[0] == 1
    assert "in fail_on" in str(caught.value)
    assert_usable()


def test_a_stuck_rank_is_named_with_its_stack() -> None:
    assert_usable()  # its start is not what is timed
    started = time.monotonic()
    with pytest.raises(WorkerTimeout, match=r"within 1 s from ranks \[1\] of 2") as caught:
        get_pool(2).run(sleep_on, 1, timeout=1)
    assert time.monotonic() - started < 10
    assert caught.value.ranks == [1]
    assert "in sleep_on" in str(caught.value)
    assert_usable()


def test_a_dead_rank_is_named_at_once_with_its_output() -> None:
    assert_usable()  # its start is not what is timed
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=r"rank 0 \(exit code 3\)") as caught:
        get_pool(2).run(exit_on, 0, timeout=30)
    assert time.monotonic() - started < 10
    assert 0 in caught.value.ranks
    assert "last words" in str(caught.value)
    assert_usable()


def test_a_rank_that_died_between_calls_is_named() -> None:
    get_pool(2).run(exit_after_the_answer, timeout=30)
    time.sleep(0.5)
    with pytest.raises(WorkerDied, match=r"rank 1 \(exit code 4\)"):
        get_pool(2).run(random_number, timeout=30)
    assert_usable()


def test_what_cannot_be_pickled_is_refused_before_it_is_sent() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        get_pool(2).run(lambda rank, world_size: rank)
    assert_usable()
