"""Dropout: probabilities are dropped, alike in forward and backward, and differently in every block."""

from __future__ import annotations

import torch
from torch import Tensor

from sptransform.ops.communication.slicing import assemble
from sptransform.ops.communication.steps import COMMUNICATING, drive
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, assert_equal

SIZE, P = 12, 0.4


def make(num_ranks: int, p: float = P, **fields) -> tuple[Problem, Ring]:
    """Queries of zeros, so that scores are equal; values that are unit vectors show the probabilities."""
    partition = Partition.zigzag(SIZE, num_ranks)
    ring = Ring(partition, partition, options={"nearest": 0, "dropout_p": p, **fields})
    return Problem.random(SIZE, value_dim=SIZE), ring


def probabilities(ring: Ring, problem: Problem, seed: int) -> Tensor:
    """[B, H, queries, keys]: what multiplies each value."""
    problem = Problem(problem.query, problem.key, torch.eye(SIZE).double().expand(2, 2, SIZE, SIZE), problem.grad)
    torch.manual_seed(seed)
    return ring.run(problem)[0]


def test_the_gradient_is_that_of_the_probabilities_kept() -> None:
    """What is dropped is read off the forward; autograd of the definition then gives the same result and gradients."""
    problem, ring = make(3)
    found = probabilities(ring, problem, seed=5)
    torch.manual_seed(5)
    result = ring.run(problem)
    xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    query, key, value = xs
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    hidden = torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1)
    exact = (query @ key.mT * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    kept = found != 0
    torch.testing.assert_close(found, (exact * kept / (1 - P)).detach(), atol=1e-12, rtol=1e-12)
    out = (exact * kept / (1 - P)) @ value
    assert_equal(result, (out.detach(), list(torch.autograd.grad(out, xs, problem.grad))))
    share = kept[:, :, ~hidden].double().mean()
    assert abs(share - (1 - P)) < 0.06


def test_every_block_of_every_rank_drops_on_its_own() -> None:
    """Two ranks, two blocks each, in one layout: their masks are not copies of one another."""
    problem, ring = make(2, nearest=None)
    found = probabilities(ring, problem, seed=0) != 0
    patterns = set()
    for own in ring.queries.owned:
        for theirs in ring.keys.owned:
            rows, columns = ([i for lo, hi in part for i in range(lo, hi)] for part in (own, theirs))
            patterns.add(tuple(found[:, :, rows][..., columns].flatten().tolist()))
    assert len(patterns) == 4


def test_the_next_call_drops_otherwise_and_the_same_seed_alike() -> None:
    problem, ring = make(2)
    torch.manual_seed(1)
    results = [ring.forward(problem)[1] for _ in range(2)]
    assert not torch.equal(results[0][0], results[1][0])
    assert results[0][2] != results[1][2]
    torch.manual_seed(1)
    assert torch.equal(ring.forward(problem)[1][0], results[0][0])


def test_the_mean_is_what_no_dropout_gives() -> None:
    problem, ring = make(2)
    plain = Ring(ring.queries, ring.keys, options={"nearest": 0}).run(problem)[0]
    torch.manual_seed(0)
    outs = torch.stack(
        [assemble([out for out, *_ in ring.forward(problem).values()], 2, ring.queries) for _ in range(60)]
    )
    deviations = (outs.mean(0) - plain) / (outs.std(0) / 60**0.5 + 1e-9)
    assert deviations.abs().mean() < 1.2


def test_one_number_is_drawn_whatever_the_shape() -> None:
    """So default generators stay in step on ranks with other shapes; none is drawn without dropout."""
    states = []
    for size, p in ((4, P), (9, P), (4, 0.0)):
        problem = Problem.random(size)
        torch.manual_seed(3)
        torch.ops.sptransform.ring_attention(problem.query, problem.key, problem.value, [], [], dropout_p=p)
        states.append(torch.get_rng_state())
    torch.manual_seed(3)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2], torch.get_rng_state())


def test_everything_dropped() -> None:
    problem, ring = make(2, p=1.0)
    out, grads = ring.run(problem)
    assert all(x.count_nonzero() == 0 for x in (out, *grads))


def test_gradients_by_finite_differences() -> None:
    problem = Problem.random(5, batch=1, heads=2, key_heads=1, dim=4)

    def op(*xs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return torch.ops.sptransform.ring_attention(*xs, [], [], nearest=0, dropout_p=P)[0]

    xs = [x.requires_grad_() for x in (problem.query, problem.key, problem.value)]
    assert torch.autograd.gradcheck(op, xs)


def test_backward_reads_the_seed_and_no_generator() -> None:
    problem, ring = make(1)
    result = ring.forward(problem)[0]
    arguments = ring.backward_arguments(problem, 0, result)
    steps = COMMUNICATING["ring_attention_backward"]

    def run() -> tuple[Tensor, ...]:
        return drive(steps(0, *arguments, **ring.keywords), None, None)

    first = run()
    torch.rand(3)
    assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


def test_gradients_of_a_learned_mask_that_hides_other_keys_in_every_row() -> None:
    """The plan in rows of the batch, which a forward may have, is none of a backward with gradients of the mask."""
    problem, size = Problem.random(80, heads=1, key_heads=1, dim=2), 80
    numbers = torch.stack([torch.arange(size) // 25, torch.arange(size) // 60])
    program = "%3 = eq.Tensor(%0, %1); %4 = logical_not(%3); %5 = masked_fill.Scalar(%2, %4, -inf)"

    def op(query: Tensor, key: Tensor, value: Tensor, learned: Tensor) -> Tensor:
        torch.manual_seed(7)
        rows, columns = [numbers[:, None, :, None]], [numbers[:, None, None], learned]
        return torch.ops.sptransform.ring_attention(
            query, key, value, rows, columns, mask=program, nearest=0, dropout_p=P
        )[0]

    learned = torch.randn(1, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    xs = [x.requires_grad_() for x in (problem.query, problem.key, problem.value, learned)]
    assert torch.autograd.gradcheck(op, xs, fast_mode=True)
