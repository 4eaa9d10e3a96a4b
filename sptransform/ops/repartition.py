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
from sptransform.sharding.partition import intersection, storage_offsets
from sptransform.sharding.placement import Shard, repartitions

_sp = torch.ops.sptransform


# ---- S -> S along one axis: the only transition where what to send depends on the rank, so compilers see one op


def _ends(x: Tensor, source: str, target: str) -> tuple[Shard, Shard]:
    # open sizes (``?``) are cut evenly, so x has the part size of both ends
    ends = Shard.parse(source, part=x), Shard.parse(target, part=x)
    if not repartitions(*ends):
        raise ValueError(f"a repartition keeps the axis and one owner of each index, not {source} to {target}")
    return ends


def _fake_repartition(x: Tensor, source: str, target: str, group_name: str) -> Tensor:
    before, after = _ends(x, source, target)
    if before.partition.is_even and after.partition.is_even:
        return x.new_empty(x.shape)
    size = after.local_dim_size(0 if after.partition.is_even else rank_in(group_name))
    return x.new_empty([*x.shape[: after.dim], size, *x.shape[after.dim + 1 :]])


@communicating("repartition(Tensor x, str source, str target, str group_name) -> Tensor", fake=_fake_repartition)
def repartition(rank: int, x: Tensor, source: str, target: str, group_name: str) -> Steps[Tensor]:
    """One all-to-all: send each rank those indices of this rank's ``source`` part that it owns in ``target``.

    Args:
        x: this rank's part, ``[.., outer * local size, ..]``.
        source, target: specs of shards along the same axis of the same dimension.

    Raises:
        ValueError: the shards have different axes, or an index does not have exactly one owner.
    """
    before, after = _ends(x, source, target)
    x, dim = expose(x, before)
    mine, wanted = before.partition.owned[rank], after.partition.owned[rank]
    leaving = [storage_offsets(mine, intersection(mine, theirs)) for theirs in after.partition.owned]
    coming = [storage_offsets(wanted, intersection(theirs, wanted)) for theirs in before.partition.owned]
    lead, tail = x.shape[:dim], x.shape[dim + 1 :]
    entry = prod(lead) * prod(tail)
    sent, received = ([entry * sum(hi - lo for lo, hi in own) for own in peers] for peers in (leaving, coming))
    pieces = (x.narrow(dim, lo, hi - lo).reshape(-1) for lo, hi in chain.from_iterable(leaving))
    pending = yield Start(torch.cat([x.new_empty(0), *pieces]), sent, received)
    came = yield Wait(pending)
    places = [*chain.from_iterable(coming)]
    parts = zip(places, came.split([entry * (hi - lo) for lo, hi in places]), strict=True)
    found = {(lo, hi): part.view(*lead, hi - lo, *tail) for (lo, hi), part in parts}
    # the empty slice is for a rank that owns nothing: cat needs a tensor
    return conceal(torch.cat([x.narrow(dim, 0, 0), *(found[place] for place in sorted(places))], dim), after)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.source, ctx.target, ctx.group = inputs


def _repartition_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _sp.repartition(grad, ctx.target, ctx.source, ctx.group), None, None, None
