"""Scaled dot-product attention: ``b h s d, b h t d, b h t e -> b h s e``, sharded by heads, queries or batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.ops.ring.kernels.interface import compute_dtype
from sptransform.rules.factors import dims_of
from sptransform.rules.rule import Dims, OpCall, OpRule, Resize, RuleFn
from sptransform.rules.table import Local, OpEntry, Sent
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import number

aten, sp = torch.ops.aten, torch.ops.sptransform


def _attention(call: OpCall, masks: tuple[Dims, ...], **more: Any) -> OpRule | None:
    """Queries, heads and batch are independent; keys and the contracted head size stay whole. Sinks, and then tables of
    the mask, come last. They have heads alone: where queries or the batch are cut, every rank has a summand of their
    gradient.

    With fewer key heads than query heads, query head ``i`` reads key head ``i // group``: the key heads a rank needs
    are the quotient of its query heads. None for layouts without a head dimension, for query heads that read key heads
    in another order, and for a query of batch size 1 that broadcasts over several batches of keys.
    """
    query, key, value = call.operand_shapes[:3]
    if len(query) != 4:
        return None
    group = query[1] // key[1]
    if query[1] != key[1] * group or key[1] != value[1] or query[0] != call.result_shapes[0][0]:
        return None
    sinks = _sinks(call)
    if call.target is not aten.scaled_dot_product_attention.default:
        key_head_of = list(call.argument("key_head_of"))
        if key_head_of and key_head_of != [i // group for i in range(number(query[1]))]:
            return None
    names = {"b": query[0], "h": query[1], "s": query[2], "t": key[2], "d": query[3], "e": value[3]}
    names["m"] = more.pop("num_masked", key[2])
    tables = more.pop("tables", ())
    entries = {f"n{i}": shape[1] for i, shape in enumerate(tables)}
    names |= entries
    operands = [dims_of(query, "bhsd"), dims_of(key, "bhtd"), dims_of(value, "bhte")]
    resize = {}
    if group > 1:
        for index in (1, 2):
            # one key head keeps the factor too: every rank needs that head, and it travels with the other heads
            operands[index] = (operands[index][0], ("h",), *operands[index][2:])
            resize["operand", index, "h"] = Resize(lambda p: p.quotient(group), links=False)
    sizes = {f: size for f, size in names.items() if size != 1}
    roles = {"heads": "h", "queries": "s", "keys": "t", "batch": "b"}
    replicated = {"t", "m", "d", *entries, *more.pop("replicated", "")}
    last = [] if sinks is None else [dims_of(call.operand_shapes[sinks], "h")]
    last += [dims_of(shape, ("h", name)) for shape, name in zip(tables, entries, strict=True)]
    return OpRule(
        (*operands, *masks, *last),
        tuple(dims_of(shape, text) for text, shape in zip(("bhse", "bhs", ""), call.result_shapes, strict=False)),
        sizes,
        replicated=frozenset(replicated & set(sizes)),
        resize=resize,
        roles={role: f for role, f in roles.items() if f in sizes},
        heavy=True,
        **more,
    )


def _sinks(call: OpCall) -> int | None:
    """Index of the operand that is sinks; None if there are none."""
    return None if call.target is aten.scaled_dot_product_attention.default else call.operand("sinks")


def attention(call: OpCall) -> OpRule | None:
    """Attention with a mask that broadcasts to the scores. ``is_causal`` depends on positions: queries stay whole."""
    masks = tuple(dims_of(shape, "bhst"[4 - len(shape) :]) for shape in call.operand_shapes[3 : _sinks(call)])
    is_causal = call.argument("is_causal")
    return _attention(call, masks, replicated="s" if is_causal else "", is_causal=is_causal)


def ring_attention(call: OpCall) -> OpRule | None:
    """Attention that knows the global positions of its queries and keys, so it can run on a part of either.

    The op applies masks by position and sends keys around the ring itself. Once it has a process group, its queries and
    keys are cut no further.
    """
    num_masks = len(call.argument("rows")) + len(call.argument("columns"))
    num_tables = len(call.argument("tables") or ())
    shapes = call.operand_shapes[3 : 3 + num_masks]
    masks = tuple(dims_of(shape, "bhsm"[4 - len(shape) :]) for shape in shapes)
    # masks cover all keys, even if the op already has one rank's part of the keys
    lengths = [shape[-1] for shape in shapes if shape and shape[-1] != 1]
    nearest, farthest = call.argument("nearest"), call.argument("farthest")
    is_cut = bool(call.argument("group_name"))
    return _attention(
        call,
        masks,
        num_masked=lengths[0] if lengths else call.operand_shapes[1][2],
        tables=call.operand_shapes[len(call.operand_shapes) - num_tables :],
        replicated="es" if is_cut else "e",
        own=frozenset({2}),
        unrepeatable=call.argument("dropout_p") > 0,
        ring_factors=frozenset() if is_cut else frozenset("t"),
        is_causal=nearest is not None and (farthest is None or nearest + farthest > 0),
    )


def _key_head_of(call: OpCall, local: Local) -> list[int]:
    """For each local query head, the local index of the key head it reads."""
    group = call.operand_shapes[0][1] // call.operand_shapes[1][1]
    heads = local.decision.partition_of("h")
    if heads is None:
        return [i // group for i in range(number(call.operand_shapes[0][1]))]
    queries = [i for lo, hi in heads.owned[local.rank] for i in range(lo, hi)]
    keys = [i for lo, hi in heads.quotient(group).owned[local.rank] for i in range(lo, hi)]
    return [keys.index(i // group) for i in queries]


def _is_regular(heads: list[int]) -> bool:
    """Whether each key head is read by the same number of consecutive query heads."""
    per_key = max(len(heads) // (max(heads, default=0) + 1), 1)
    return heads == [i // per_key for i in range(len(heads))]


def _attention_local(call: OpCall, local: Local) -> Any:
    heads = _key_head_of(call, local)
    repeated = call.target is sp.attention.default
    dropout_p = call.argument("dropout_p")
    is_empty = 0 in local.result_shapes[0]
    if _is_regular(heads) and not repeated and dropout_p == 0.0 and not is_empty:
        return local.run(call)
    changed = {
        "key_head_of": [] if heads == list(range(len(heads))) else heads,
        "group_name": local.group if dropout_p else "",
    }
    if repeated:
        return local.run(call, **changed)
    mask = local.operands[3] if len(local.operands) > 3 else None
    arguments = (*local.operands[:3], mask, dropout_p, call.argument("is_causal"))
    return local.emit(sp.attention.default, arguments, {"scale": call.argument("scale"), **changed})


def _ring_attention_local(call: OpCall, local: Local) -> Any:
    heads = _key_head_of(call, local)
    changed: dict[str, Any] = {"key_head_of": [] if _is_regular(heads) else heads}
    for argument, factor in (("queries", "s"), ("keys", "t")):
        partition = local.decision.partition_of(factor)
        if partition is not None:
            changed |= {argument: str(partition), "group_name": local.group}
    return local.run(call, **changed)


def _ring_sends(call: OpCall, operands: Sequence[Tensor], rank: int) -> tuple[Sent, Sent]:
    """Forward: one ring pass of keys and values. Backward: one more, and one of their gradients in the sums' dtype."""
    _, key, value = operands[:3]
    partition = Partition.parse(call.argument("keys"), part=key.shape[2])
    num_ranks = partition.num_ranks
    entries = key.shape[0] * key.shape[1] * (key.shape[3] + value.shape[3])
    # at hop h a rank forwards the keys of rank - h, h = 0 .. N - 2; gradients start one rank later, h = 1 .. N - 1
    sizes = [partition.local_size((rank - hop) % num_ranks) for hop in range(num_ranks)]
    ahead = entries * sum(sizes[:-1]) * key.element_size()
    home = entries * sum(sizes[1:]) * compute_dtype(key.dtype).itemsize
    hops = num_ranks - 1
    return Sent("send_recv", hops, ahead), Sent("send_recv", 2 * hops, ahead + home)


RING_ATTENTION = sp.ring_attention.default

# attention as models write it, or as UnrepeatKeyHeads leaves it
ATTENTION = (aten.scaled_dot_product_attention.default, sp.attention.default)


def mask_of(node: fx.Node) -> fx.Node | None:
    """The mask argument of a node whose target is in ``ATTENTION``."""
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def sinks_of(node: fx.Node) -> fx.Node | None:
    """The sinks of a node whose target is in ``ATTENTION``."""
    return node.args[6] if len(node.args) > 6 else node.kwargs.get("sinks")


def softcap_of(node: fx.Node) -> float:
    """The softcap of a node whose target is in ``ATTENTION``."""
    return node.kwargs.get("softcap", 0.0)


_ATTENTION = OpEntry(attention, _attention_local)

TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    *((op, _ATTENTION) for op in ATTENTION),
    (RING_ATTENTION, OpEntry(ring_attention, _ring_attention_local, _ring_sends)),
]
