"""Repartition: an all-to-all along one axis that moves indices to new owners."""

from __future__ import annotations

from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.communication.slicing import conceal, expose
from sptransform.ops.communication.steps import Start, Steps, Wait, communicating
from sptransform.ops.groups import rank_in
from sptransform.sharding.intervals import Intervals, intersection, storage_offsets
from sptransform.sharding.placement import Shard, repartitions

_sp = torch.ops.sptransform


# ---- S -> S along one axis: the only transition where what to send depends on the rank, so compilers see one op


def _ends(x: Tensor, source: str, target: str) -> tuple[Shard, Shard]:
    # open sizes (``?``) are cut evenly, so x has the part size of both ends
    ends = Shard.parse(source, part=x), Shard.parse(target, part=x)
    if not repartitions(*ends) and not repartitions(*reversed(ends)):
        what = "a repartition keeps the axis and one owner of each index at one end"
        raise ValueError(f"{what}, not {source} to {target}")
    return ends if ends[0].outer == ends[1].outer else (ends[0].flat, ends[1].flat)


def _fake_repartition(x: Tensor, source: str, target: str, group_name: str) -> Tensor:
    before, after = _ends(x, source, target)
    if before.partition.is_even and before.partition.is_exact and after.partition.is_even and after.partition.is_exact:
        return x.new_empty(x.shape)
    size = after.local_dim_size(0 if after.partition.is_even else rank_in(group_name))
    return x.new_empty([*x.shape[: after.dim], size, *x.shape[after.dim + 1 :]])


@communicating("repartition(Tensor x, str source, str target, str group_name) -> Tensor", fake=_fake_repartition)
def repartition(rank: int, x: Tensor, source: str, target: str, group_name: str) -> Steps[Tensor]:
    """One all-to-all: send each rank those indices of this rank's ``source`` part that it owns in ``target``.

    Several ranks may own an index in ``target``, such as the rows that neighbours of a convolution read. The transpose
    starts from that, and sums what it has of an index.

    Args:
        x: this rank's part, ``[.., outer * local size, ..]``.
        source, target: specs of shards along the same axis of the same dimension; one of them may be a flattened one.

    Raises:
        ValueError: the shards have different axes, or an index has several owners in both.
    """
    before, after = _ends(x, source, target)
    x, dim = expose(x, before)
    mine, wanted = before.partition.owned[rank], after.partition.owned[rank]
    leaving = [storage_offsets(mine, intersection(mine, theirs)) for theirs in after.partition.owned]
    coming = [storage_offsets(wanted, intersection(theirs, wanted)) for theirs in before.partition.owned]
    lead, tail = x.shape[:dim], x.shape[dim + 1 :]
    entry = prod(lead) * prod(tail)
    kept = [x.narrow(dim, lo, hi - lo) for lo, hi in leaving[rank]]
    places = [*coming[rank]]
    # what a rank keeps is no part of the message
    leaving[rank] = coming[rank] = ()
    sent, received = ([entry * sum(hi - lo for lo, hi in own) for own in peers] for peers in (leaving, coming))
    pieces = (x.narrow(dim, lo, hi - lo).reshape(-1) for lo, hi in chain.from_iterable(leaving))
    pending = yield Start(torch.cat([x.new_empty(0), *pieces]), sent, received)
    came = yield Wait(pending)
    others = [*chain.from_iterable(coming)]
    parts = zip(others, came.split([entry * (hi - lo) for lo, hi in others]), strict=True)
    kept += [part.view(*lead, hi - lo, *tail) for (lo, hi), part in parts]
    return conceal(_placed(x, dim, (*places, *others), kept, after.partition.local_size(rank)), after)


def _placed(x: Tensor, dim: int, places: Intervals, pieces: list[Tensor], size: int) -> Tensor:
    """The ``pieces`` at their ``places``, added where these overlap, and zeros elsewhere."""
    order = sorted(range(len(places)), key=places.__getitem__)
    bounds = [0, *(bound for i in order for bound in places[i]), size]
    if all(end == start for end, start in zip(bounds[::2], bounds[1::2], strict=True)):
        # the empty slice is for a rank that owns nothing: cat needs a tensor
        return torch.cat([x.narrow(dim, 0, 0), *(pieces[i] for i in order)], dim)
    whole = x.new_zeros([*x.shape[:dim], size, *x.shape[dim + 1 :]])
    for (lo, hi), piece in zip(places, pieces, strict=True):
        whole.narrow(dim, lo, hi - lo).add_(piece)
    return whole


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.source, ctx.target, ctx.group = inputs


def _repartition_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _sp.repartition(grad, ctx.target, ctx.source, ctx.group), None, None, None
