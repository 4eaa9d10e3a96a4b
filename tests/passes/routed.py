"""Experts as models spell them: rows sorted by expert in one of several ways, and put back in one of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tests.support import grouped_kernel  # noqa: F401 - registers the kernel

WIDTH, INNER, EXPERTS = 4, 6, 3
grouped_mm = torch.ops.sptests.grouped_mm_fallback


def read_inverse(rows: Tensor, order: Tensor, x: Tensor, k: int, inverse: Tensor) -> Tensor:
    return rows[inverse].unflatten(0, (-1, k)).sum(1)


def inverse_by_sort(rows: Tensor, order: Tensor, x: Tensor, k: int) -> Tensor:
    return read_inverse(rows, order, x, k, order.to(torch.int32).argsort())


def inverse_by_write(rows: Tensor, order: Tensor, x: Tensor, k: int) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return read_inverse(rows, order, x, k, inverse)


def inverse_by_scatter(rows: Tensor, order: Tensor, x: Tensor, k: int) -> Tensor:
    inverse = torch.scatter(torch.zeros_like(order), 0, order, torch.arange(len(order)))
    return torch.index_select(rows, 0, inverse).unflatten(0, (-1, k)).sum(1)


def written(rows: Tensor, order: Tensor, x: Tensor, k: int) -> Tensor:
    out = torch.empty_like(rows)
    out[order] = rows
    return out.unflatten(0, (-1, k)).sum(1)


def added(rows: Tensor, order: Tensor, x: Tensor, k: int) -> Tensor:
    return x.index_add(0, order // k, rows)


def added_at_list(rows: Tensor, order: Tensor, x: Tensor, k: int) -> Tensor:
    return torch.zeros_like(x).index_put((torch.div(order, k, rounding_mode="floor"),), rows, accumulate=True)


def added_by_scatter(rows: Tensor, order: Tensor, x: Tensor, k: int) -> Tensor:
    return torch.zeros_like(x).scatter_add(0, (order // k)[:, None].expand(-1, x.shape[1]), rows)


def added_by_number(rows: Tensor, order: Tensor, x: Tensor, k: int) -> Tensor:
    tokens = torch.arange(len(x))[:, None].expand(-1, k).flatten()
    return torch.zeros_like(x).index_add(0, tokens[order], rows)


LEAVE = (
    inverse_by_sort, inverse_by_write, inverse_by_scatter, written, added, added_at_list, added_by_scatter,
    added_by_number,
)  # fmt: skip


ENTER: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "read": lambda x, order, k: x[order // k],
    "selected": lambda x, order, k: torch.index_select(x, 0, order // k),
    "gathered": lambda x, order, k: x.gather(0, (order // k)[:, None].expand(-1, x.shape[1])),
    "repeated": lambda x, order, k: x.repeat_interleave(k, 0)[order],
    "by number": lambda x, order, k: x[torch.arange(len(x)).repeat_interleave(k)[order]],
}


def sort_by(expert: Tensor) -> tuple[Tensor, Tensor]:
    return expert.sort(stable=True)


def read_argsort(expert: Tensor) -> tuple[Tensor, Tensor]:
    order = expert.argsort()
    return expert[order], order


def cumulated(expert: Tensor, keys: Tensor) -> Tensor:
    return torch.histc(keys.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)


def cumulated_unsorted(expert: Tensor, keys: Tensor) -> Tensor:
    return torch.histc(expert.double(), EXPERTS, 0, EXPERTS).to(torch.int64).cumsum(0).int()


def searched(expert: Tensor, keys: Tensor) -> Tensor:
    return torch.searchsorted(keys, torch.arange(EXPERTS), right=True)


@dataclass(frozen=True)
class Spelling:
    """A way to write experts down."""

    enter: str = "read"
    leave: Callable[..., Tensor] = inverse_by_write
    sort: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.sort
    ends: Callable[[Tensor, Tensor], Tensor] = cumulated
    k: int = 2
    bias: bool = True

    def __str__(self) -> str:
        how = (self.enter, self.leave.__name__, self.sort.__name__, self.ends.__name__, f"top {self.k}")
        return " ".join(how) + ("" if self.bias else " plain")

    @property
    def model(self) -> Callable[..., Tensor]:
        def model(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            weights, expert = (rows @ gate).softmax(-1).topk(self.k)
            weights, expert = weights.flatten(), expert.flatten()
            keys, order = self.sort(expert)
            ends = self.ends(expert, keys)
            hidden = grouped_mm(ENTER[self.enter](rows, order, self.k), up, ends)
            first, second = (hidden + bias[keys] if self.bias else hidden).chunk(2, -1)
            product = grouped_mm(functional.silu(first) * second, down, ends)
            out = self.leave(product * weights[order][:, None], order, rows, self.k)
            return out.view_as(x).square().sum()

        return model


def operands(length: int = 10) -> tuple[Tensor, ...]:
    """Tokens, of which many choose one expert and none the last, and weights."""
    shapes = ((2, length, WIDTH), (WIDTH, EXPERTS), (EXPERTS, WIDTH, INNER), (EXPERTS, INNER // 2, WIDTH))
    x, gate, up, down = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    gate[:, 2] = gate[:, 0]  # ties in what is sorted
    bias = torch.randn(EXPERTS, INNER, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (x, gate, up, down, bias))
