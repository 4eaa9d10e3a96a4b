"""One op per change of placement, each an autograd function whose backward is its transpose.

Gradients follow the types of :mod:`sptransform.sharding.placement`: for ``I`` and ``P`` every rank holds the gradient,
for ``R`` a pending sum, for ``S`` its part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.ops.communication import collectives
from sptransform.ops.communication.all_to_all import exchange
from sptransform.ops.library import LIBRARY, composite
from sptransform.ops.repartition import _remember, _repartition_back
from sptransform.sharding.placement import Shard

_sp = torch.ops.sptransform


class _Replicate(torch.autograd.Function):
    """I -> R: nothing / all-reduce, many tensors in one message per dtype."""

    @staticmethod
    def forward(ctx: Any, group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)  # a parameter without a gradient stays without one
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        summed: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(grad.dtype for grad in grads if grad is not None):
            members = [i for i, grad in enumerate(grads) if grad is not None and grad.dtype == dtype]
            if len(members) == 1:
                summed[members[0]] = collectives.all_reduce(grads[members[0]], ctx.group)
                continue
            flat = torch.cat([grads[i].reshape(-1) for i in members])
            parts = collectives.all_reduce(flat, ctx.group).split([grads[i].numel() for i in members])
            summed |= {i: part.view(grads[i].shape) for i, part in zip(members, parts, strict=True)}
        return None, *map(summed.get, range(len(grads)))


class _Slice(torch.autograd.Function):
    """R -> S: slice / pad to a pending sum. I -> S: slice / all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: str, group: str, invariant: bool) -> Tensor:
        ctx.spec, ctx.group, ctx.invariant = spec, group, invariant
        return _sp.local_slice(x, spec, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.invariant:
            return collectives.all_gather(grad, Shard.parse(ctx.spec, part=grad), ctx.group), None, None, None
        return _sp.embed_in_zeros(grad, ctx.spec, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    """S -> R: all-gather / reduce-scatter. S -> I: all-gather / slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: str, group: str, invariant: bool) -> Tensor:
        ctx.spec, ctx.group, ctx.invariant = spec, group, invariant
        return collectives.all_gather(x, Shard.parse(spec, part=x), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.invariant:
            return _sp.local_slice(grad, ctx.spec, ctx.group), None, None, None
        return collectives.reduce_scatter(grad, Shard.parse(ctx.spec, full=grad), ctx.group), None, None, None


class _AllGatherPacked(torch.autograd.Function):
    """S -> R: all-gather / reduce-scatter, several tensors in one message."""

    @staticmethod
    def forward(ctx: Any, specs: list[str], group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.specs, ctx.group = specs, group
        shards = [Shard.parse(spec, part=x) for spec, x in zip(specs, xs, strict=True)]
        return tuple(collectives.all_gather_packed(list(xs), shards, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        shards = [Shard.parse(spec, full=grad) for spec, grad in zip(ctx.specs, grads, strict=True)]
        return None, None, *collectives.reduce_scatter_packed(list(grads), shards, ctx.group)


class _ReduceScatter(torch.autograd.Function):
    """P -> S: reduce-scatter / all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: str, group: str) -> Tensor:
        ctx.spec, ctx.group = spec, group
        return collectives.reduce_scatter(x, Shard.parse(spec, full=x), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return collectives.all_gather(grad, Shard.parse(ctx.spec, part=grad), ctx.group), None, None


class _AllReduce(torch.autograd.Function):
    """P -> I: all-reduce / nothing. P -> R: all-reduce / all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, invariant: bool) -> Tensor:
        ctx.group, ctx.invariant = group, invariant
        return collectives.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad if ctx.invariant else collectives.all_reduce(grad, ctx.group), None, None


class _FirstRank(torch.autograd.Function):
    """I -> P: first rank keeps the value / nothing. R -> I: nothing / first rank keeps the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, mask_value: bool) -> Tensor:
        ctx.group, ctx.mask_value = group, mask_value
        return _sp.on_first_rank(x, group) if mask_value else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad if ctx.mask_value else _sp.on_first_rank(grad, ctx.group), None, None


class _KeepOwn(torch.autograd.Function):
    """S -> S, from shared indices to the first owner of each: local slice / pad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: str, target: str, group: str) -> Tensor:
        ctx.source, ctx.target, ctx.group = source, target, group
        return _sp.local_slice(_sp.embed_in_zeros(x, source, group), target, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _sp.local_slice(_sp.embed_in_zeros(grad, ctx.target, ctx.group), ctx.source, ctx.group), None, None, None


class _Exchange(torch.autograd.Function):
    """S(i) -> S(j): all-to-all / all-to-all, several tensors in one message."""

    @staticmethod
    def forward(ctx: Any, sources: list[str], targets: list[str], group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.sources, ctx.targets, ctx.group = sources, targets, group
        return tuple(_exchange(list(xs), sources, targets, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *_exchange(list(grads), ctx.targets, ctx.sources, ctx.group)


def _exchange(xs: list[Tensor], sources: list[str], targets: list[str], group: str) -> list[Tensor]:
    return exchange(
        xs,
        [Shard.parse(source, part=x) for source, x in zip(sources, xs, strict=True)],
        [Shard.parse(target, full=x) for target, x in zip(targets, xs, strict=True)],
        group,
    )


@composite("replicate(Tensor[] xs, str group_name) -> Tensor[]")
def replicate(xs: list[Tensor], group_name: str) -> list[Tensor]:
    return list(_Replicate.apply(group_name, *xs))


@composite("slice(Tensor x, str spec, str group_name, bool invariant) -> Tensor")
def slice_(x: Tensor, spec: str, group_name: str, invariant: bool) -> Tensor:
    return _Slice.apply(x, spec, group_name, invariant)


@composite("all_gather(Tensor x, str spec, str group_name, bool invariant) -> Tensor")
def all_gather(x: Tensor, spec: str, group_name: str, invariant: bool) -> Tensor:
    return _AllGather.apply(x, spec, group_name, invariant)


@composite("all_gather_packed(Tensor[] xs, str[] specs, str group_name) -> Tensor[]")
def all_gather_packed(xs: list[Tensor], specs: list[str], group_name: str) -> list[Tensor]:
    return list(_AllGatherPacked.apply(specs, group_name, *xs))


@composite("reduce_scatter(Tensor x, str spec, str group_name) -> Tensor")
def reduce_scatter(x: Tensor, spec: str, group_name: str) -> Tensor:
    return _ReduceScatter.apply(x, spec, group_name)


@composite("all_reduce(Tensor x, str group_name, bool invariant) -> Tensor")
def all_reduce(x: Tensor, group_name: str, invariant: bool) -> Tensor:
    return _AllReduce.apply(x, group_name, invariant)


@composite("first_rank(Tensor x, str group_name, bool mask_value) -> Tensor")
def first_rank(x: Tensor, group_name: str, mask_value: bool) -> Tensor:
    return _FirstRank.apply(x, group_name, mask_value)


@composite("keep_own(Tensor x, str source, str target, str group_name) -> Tensor")
def keep_own(x: Tensor, source: str, target: str, group_name: str) -> Tensor:
    return _KeepOwn.apply(x, source, target, group_name)


@composite("all_to_all(Tensor[] xs, str[] sources, str[] targets, str group_name) -> Tensor[]")
def all_to_all(xs: list[Tensor], sources: list[str], targets: list[str], group_name: str) -> list[Tensor]:
    return list(_Exchange.apply(sources, targets, group_name, *xs))


torch.library.register_autograd("sptransform::repartition", _repartition_back, setup_context=_remember, lib=LIBRARY)
