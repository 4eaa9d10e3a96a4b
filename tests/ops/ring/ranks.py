"""Ring attention on all ranks in this process, and the same on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sptransform.ops.communication.slicing import assemble, select
from sptransform.ops.communication.steps import COMMUNICATING, perform_together
from sptransform.sharding.partition import Partition

Run = tuple[Tensor, list[Tensor]]


def visible(num_queries: int, num_keys: int, nearest: int | None, farthest: int | None) -> Tensor:
    """[queries, keys]: the definition."""
    distance = torch.arange(num_queries)[:, None] - torch.arange(num_keys)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if nearest is not None:
        seen &= distance >= nearest
    if farthest is not None:
        seen &= distance <= farthest
    return seen


@dataclass(frozen=True)
class Problem:
    """Whole tensors: query, key, value, and the gradient of the result."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    @staticmethod
    def random(
        num_queries: int,
        num_keys: int | None = None,
        *,
        batch: int = 2,
        heads: int = 4,
        key_heads: int = 2,
        dim: int = 8,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Problem:
        num_keys, value_dim = num_keys or num_queries, value_dim or dim
        shapes = [
            (batch, heads, num_queries, dim),
            (batch, key_heads, num_keys, dim),
            (batch, key_heads, num_keys, value_dim),
            (batch, heads, num_queries, value_dim),
        ]
        generator = torch.Generator().manual_seed(seed)
        return Problem(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(*(x.to(dtype) for x in (self.query, self.key, self.value, self.grad)))


def one_device(
    problem: Problem, mask: Tensor | None = None, *, scale: float | None = None, key_head_of: Sequence[int] = ()
) -> Run:
    """Result and gradients of torch's own attention."""
    xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    query, key, value = xs
    if key_head_of:
        key, value = (x[:, list(key_head_of)] for x in (key, value))
    out = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return out.detach(), list(torch.autograd.grad(out, xs, problem.grad))


@dataclass(frozen=True)
class Ring:
    """How ranks share a problem."""

    queries: Partition
    keys: Partition
    rows: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    circulates: bool = True
    sinks: Tensor | None = None
    tables: tuple[Tensor, ...] = ()
    trained: tuple[int, ...] = ()

    @property
    def keywords(self) -> dict[str, Any]:
        keys = str(self.keys) if self.circulates else ""
        return {"queries": str(self.queries), "keys": keys, "group_name": "ring", **self.options}

    def own(self, problem: Problem, rank: int) -> list[Any]:
        """Arguments of the op on a rank."""
        query, *of_keys = problem.query, problem.key, problem.value
        if self.circulates:
            of_keys = [select(x, 2, self.keys.owned[rank]) for x in of_keys]
        rows = [x if x.shape[-2] == 1 else select(x, x.dim() - 2, self.queries.owned[rank]) for x in self.rows]
        return [select(query, 2, self.queries.owned[rank]), *of_keys, rows, list(self.columns)]

    def forward(self, problem: Problem) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        steps = COMMUNICATING["ring_attention"]
        ranks = range(self.queries.num_ranks)
        return perform_together(
            {rank: steps(rank, *self.own(problem, rank), self.sinks, [*self.tables], **self.keywords) for rank in ranks}
        )

    def backward(self, problem: Problem, results: dict[int, tuple[Tensor, ...]]) -> dict[int, tuple[Tensor, ...]]:
        steps = COMMUNICATING["ring_attention_backward"]
        return perform_together(
            {
                rank: steps(
                    rank,
                    *self.backward_arguments(problem, rank, results[rank]),
                    [*self.tables],
                    **self.keywords,
                    trained=self.trained,
                )
                for rank in results
            }
        )

    def backward_arguments(self, problem: Problem, rank: int, result: tuple[Tensor, ...]) -> list[Any]:
        return [select(problem.grad, 2, self.queries.owned[rank]), *self.own(problem, rank), *result]

    def of_operands(self, problem: Problem) -> list[Tensor]:
        """Whole gradients of the trained operands of the mask: the sum over ranks, of rows their parts."""
        grads = self.backward(problem, self.forward(problem))
        found = []
        for at, i in enumerate(self.trained, start=3):
            parts = [grads[rank][at] for rank in sorted(grads)]
            is_row = i < len(self.rows) and self.rows[i].shape[-2] != 1
            found.append(assemble(parts, parts[0].dim() - 2, self.queries) if is_row else sum(parts))
        return found

    def run(self, problem: Problem) -> Run:
        """Whole result and gradients."""
        results = self.forward(problem)
        grads = self.backward(problem, results)
        ranks = range(self.queries.num_ranks)
        out = assemble([results[rank][0] for rank in ranks], 2, self.queries)
        grad_query = assemble([grads[rank][0] for rank in ranks], 2, self.queries)
        if not self.circulates:
            return out, [grad_query, *(sum(grads[rank][i] for rank in ranks) for i in (1, 2))]
        return out, [grad_query, *(assemble([grads[rank][i] for rank in ranks], 2, self.keys) for i in (1, 2))]


def assert_equal(found: Run, expected: Run, tolerance: float = 1e-12) -> None:
    for name, x, y in zip(("out", "query", "key", "value"), (found[0], *found[1]), (expected[0], *expected[1]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
