"""A linear recurrence along a dimension, and what ranks send of scans along a dimension that is cut: their totals.

Each rank scans its block with nothing before it. What enters the block follows from the totals of the ranks before:
of a recurrence its last state and its total decay, of a cumulative sum its sum. So what is sent does not grow with the
dimension. As in the chunks of Mamba-2 (Dao and Gu, arXiv 2405.21060, §6), with ranks for chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from sptransform.ops.library import composite
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard

_sp = torch.ops.sptransform


@composite("scan(Tensor x, Tensor log_decay, int dim) -> Tensor")
def scan(x: Tensor, log_decay: Tensor, dim: int) -> Tensor:
    """``y[i] = exp(log_decay[i]) * y[i - 1] + x[i]`` along ``dim``.

    ``log_decay`` broadcasts to ``x`` along the other dimensions.
    """
    dim %= x.ndim
    if not x.numel():
        return x + log_decay
    own = [d for d in range(x.ndim) if log_decay.shape[d] != 1 and d != dim]
    size, num_matrices = x.shape[dim], prod(x.shape[d] for d in own)
    if size * size * num_matrices > x.numel():
        return _doubled(x, log_decay, dim)
    order = [*own, dim, *(d for d in range(x.ndim) if d not in own and d != dim)]
    rows = x.permute(order)
    flat = rows.reshape(num_matrices, size, -1)
    decays = _decays(log_decay.permute(order).reshape(flat.shape[:2]))
    y = torch.bmm(decays.to(flat.dtype), flat).reshape(rows.shape)
    return y.permute([order.index(d) for d in range(x.ndim)])


def _doubled(x: Tensor, log_decay: Tensor, dim: int) -> Tensor:
    """:func:`scan` where matrices of decays would be larger than the rows: rows reach 1, 2, 4, .. rows further.

    Hillis and Steele, "Data Parallel Algorithms", Communications of the ACM 29(12), 1986.
    """
    size, step = x.shape[dim], 1
    while step < size:
        later = [part.narrow(dim, step, size - step) for part in (x, log_decay)]
        earlier = [part.narrow(dim, 0, size - step) for part in (x, log_decay)]
        first = [part.narrow(dim, 0, step) for part in (x, log_decay)]
        x = torch.cat([first[0], later[0] + later[1].exp() * earlier[0]], dim)
        log_decay = torch.cat([first[1], later[1] + earlier[1]], dim)
        step *= 2
    return x


def _decays(log_decay: Tensor) -> Tensor:
    """What is left of entry j at entry i, ``exp(sum of log_decay over j < k <= i)``: ``[.., n] -> [.., n, n]``.

    Sums over parts, not differences of sums from the start, which would lose the digits of the small ones.
    """
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    steps = log_decay[..., None].expand(*log_decay.shape, size).masked_fill(~ones.tril(-1), 0)
    return steps.cumsum(-2).masked_fill(~ones.tril(), -torch.inf).exp()


@composite("joined_scan(Tensor x, Tensor log_decay, int dim, int outer, int num_ranks, str group_name) -> Tensor")
def joined_scan(x: Tensor, log_decay: Tensor, dim: int, outer: int, num_ranks: int, group_name: str) -> Tensor:
    """:func:`scan` of which each rank has a block, of each of ``outer`` parts of the dimension."""
    dim %= x.ndim
    parts, decays = _parts(x, dim, outer), _parts(log_decay, dim, outer)
    own = scan(parts, decays, dim + 1)
    size = parts.shape[dim + 1]
    last = own.select(dim + 1, size - 1) if size else own.sum(dim + 1)
    lasts, totals = (_in_order(x, dim) for x in _gathered([last, decays.sum(dim + 1)], num_ranks, group_name))
    entering = [torch.zeros_like(last.select(dim, 0))]
    for before in range(outer * num_ranks - 1):
        entering.append(totals.select(dim, before).exp() * entering[-1] + lasts.select(dim, before))
    entered = _of_this_rank(torch.stack(entering, dim), dim, outer, num_ranks, group_name)
    return (own + decays.cumsum(dim + 1).exp() * entered).reshape(x.shape)


@composite("joined_cumsum(Tensor x, int dim, ScalarType dtype, int outer, int num_ranks, str group_name) -> Tensor")
def joined_cumsum(x: Tensor, dim: int, dtype: torch.dtype, outer: int, num_ranks: int, group_name: str) -> Tensor:
    """``cumsum`` of which each rank has a block, of each of ``outer`` parts of the dimension."""
    # one device rounds each sum once, where its kernel sums in float64; here the sums before would be rounded too
    wide = torch.float64 if dtype == torch.float32 else dtype
    given = x.to(wide), dim, outer, num_ranks, group_name
    return _joined(*given, torch.cumsum, lambda x, dim: x.sum(dim), torch.add, 0).to(dtype)


@composite("joined_cumprod(Tensor x, int dim, ScalarType dtype, int outer, int num_ranks, str group_name) -> Tensor")
def joined_cumprod(x: Tensor, dim: int, dtype: torch.dtype, outer: int, num_ranks: int, group_name: str) -> Tensor:
    """``cumprod`` of which each rank has a block, of each of ``outer`` parts of the dimension."""
    return _joined(
        x.to(dtype), dim, outer, num_ranks, group_name, torch.cumprod, lambda x, dim: x.prod(dim), torch.mul, 1
    )


def _joined(
    x: Tensor,
    dim: int,
    outer: int,
    num_ranks: int,
    group_name: str,
    running: Callable[[Tensor, int], Tensor],
    total: Callable[[Tensor, int], Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
    neutral: int,
) -> Tensor:
    dim %= x.ndim
    parts = _parts(x, dim, outer)
    (gathered,) = _gathered([total(parts, dim + 1)], num_ranks, group_name)
    totals = _in_order(gathered, dim)
    before = totals.narrow(dim, 0, outer * num_ranks - 1)
    entering = torch.cat([torch.full_like(totals.narrow(dim, 0, 1), neutral), running(before, dim)], dim)
    entered = _of_this_rank(entering, dim, outer, num_ranks, group_name)
    return combine(running(parts, dim + 1), entered).reshape(x.shape)


def _parts(x: Tensor, dim: int, outer: int) -> Tensor:
    # no -1: it is ambiguous where a rank owns nothing
    return x.reshape(*x.shape[:dim], outer, x.shape[dim] // outer, *x.shape[dim + 1 :])


def _gathered(xs: list[Tensor], num_ranks: int, group_name: str) -> list[Tensor]:
    """Every rank's tensors, stacked."""
    spec = Shard(0, Partition.blocks(num_ranks, num_ranks)).spec
    return _sp.all_gather_packed([x.unsqueeze(0) for x in xs], [spec] * len(xs), group_name)


def _in_order(xs: Tensor, dim: int) -> Tensor:
    """What ranks have of each part, ``[ranks, .., parts, ..]``, in the order of the dimension that was cut."""
    return xs.movedim(0, dim + 1).flatten(dim, dim + 1)


def _of_this_rank(xs: Tensor, dim: int, outer: int, num_ranks: int, group_name: str) -> Tensor:
    """This rank's entries of what :func:`_in_order` gives, with a dimension of size 1 for those of its block."""
    spec = Shard(0, Partition.blocks(num_ranks, num_ranks)).spec
    of_ranks = xs.unflatten(dim, (outer, num_ranks)).movedim(dim + 1, 0)
    return _sp.slice(of_ranks, spec, group_name, False).squeeze(0).unsqueeze(dim + 1)
