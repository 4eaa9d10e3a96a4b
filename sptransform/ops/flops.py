"""What the custom ops compute, in FLOPs, for ``torch.utils.flop_counter`` and whoever else reads its registry.

2 for each multiply-add, as torch counts. Attention counts the pairs of a query and a key that are visible, where torch
counts all pairs; its backward counts 2.5 times its forward, as torch does, for the scores are computed again. A call
with a computed mask counts all pairs, for its kernel computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sptransform.ops import logit_sums, ring  # noqa: F401 - register the ops
from sptransform.ops.groups import rank_in
from sptransform.ops.ring.plan import attended_pairs
from sptransform.sharding.partition import Partition

_sp = torch.ops.sptransform
Shape = Sequence[int]


def block_pairs(queries: int, keys: int, *, causal: bool = False, sliding: bool = False) -> int:
    """Visible pairs of one block: ``causal`` hides a triangle at its end, ``sliding`` one at its beginning."""
    return queries * keys - (causal + sliding) * (queries * (queries - 1) // 2)


def attention_flops(query: Shape, value: Shape, pairs: int, *, backward: bool) -> int:
    """FLOPs of attention of query [B, H, s, D] to value [B, K, t, E] over ``pairs`` of one head of one row."""
    (batch, heads, _, dim), value_dim = query, value[3]
    scores, results = (2 * batch * heads * pairs * size for size in (dim, value_dim))
    # forward: scores, results. backward: scores again, and two products for each of the two
    return 3 * scores + 2 * results if backward else scores + results


@register_flop_formula(_sp.attention_block)
def _block(query: Shape, key: Shape, value: Shape, mask: Any, causal: bool, **options: Any) -> int:
    pairs = block_pairs(query[2], key[2], causal=causal, sliding=options.get("sliding", False))
    return attention_flops(query, value, pairs, backward=False)


@register_flop_formula([_sp.attention_block_backward, _sp.attention_block_backward_with_mask])
def _block_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, mask: Any, out: Shape, lse: Shape, causal: bool, **options: Any
) -> int:
    pairs = block_pairs(query[2], key[2], causal=causal, sliding=options.get("sliding", False))
    return attention_flops(query, value, pairs, backward=True)


@register_flop_formula(_sp.ring_attention, get_raw=True)
def _ring(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None, **options: Any) -> int:
    return attention_flops(query.shape, value.shape, _ring_pairs(query, key, **options), backward=False)


@register_flop_formula(_sp.ring_attention_backward, get_raw=True)
def _ring_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None, **options: Any
) -> int:
    return attention_flops(query.shape, value.shape, _ring_pairs(query, key, **options), backward=True)


def _ring_pairs(
    query: Tensor,
    key: Tensor,
    *,
    queries: str = "",
    keys: str = "",
    group_name: str = "",
    nearest: int | None = None,
    farthest: int | None = None,
    **_: Any,
) -> int:
    """The pairs of this rank's queries and all keys of the ring that the limits leave, whatever a mask hides of them."""
    own = Partition.parse(queries, part=query.shape[2]) if queries else None
    all_keys = Partition.parse(keys, part=key.shape[2]).size if keys else key.shape[2]
    positions = own.owned[rank_in(group_name) if group_name else 0] if own else ((0, query.shape[2]),)
    return attended_pairs(positions, ((0, all_keys),), nearest, farthest)


@register_flop_formula(_sp.logit_sums)
def _logit_sums(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(_sp.logit_sums_backward)
def _logit_sums_backward(x: Shape, weight: Shape, *_: Any, needed: Sequence[bool], **__: Any) -> int:
    """The logits again, then the gradients of the rows and of the weight."""
    return 2 * x[0] * weight[0] * weight[1] * (1 + sum(map(bool, needed[:2])))
