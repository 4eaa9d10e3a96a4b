"""Scaled dot-product attention: ``b h s d, b h t d, b h t e -> b h s e``, and how its heads are cut."""

from __future__ import annotations

from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.rule_table import Local, OpEntry
from sptransform.rules import OpCall, OpRule, Resize, RuleFn

aten = torch.ops.aten


def attention(call: OpCall) -> OpRule | None:
    """Queries, heads and batch are independent; keys and the contracted head size stay whole.

    With fewer key heads than query heads, query head ``i`` reads key head ``i // group``: the key heads a rank needs
    are the quotient of its query heads. A causal mask is known to the op by position, so it keeps queries whole too.
    None for layouts without a head dimension, for query heads that read key heads in another order, and for one
    query that several batches of keys share.
    """
    query, key, value = call.operand_shapes[:3]
    if len(query) != 4:
        return None
    group = query[1] // key[1]
    if query[1] != key[1] * group or key[1] != value[1] or query[0] != call.result_shapes[0][0]:
        return None
    if call.target is torch.ops.sptransform.attention.default:
        key_head_of = list(call.argument("key_head_of"))
        if key_head_of and key_head_of != [i // group for i in range(query[1])]:
            return None
    names = {"b": query[0], "h": query[1], "s": query[2], "t": key[2], "d": query[3], "e": value[3]}

    def dims(text: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
        return tuple((f,) if size != 1 else () for f, size in zip(text, shape, strict=True))

    operands = [dims("bhsd", query), dims("bhtd", key), dims("bhte", value)]
    resize = {}
    if group > 1:
        for index in (1, 2):
            # kept even for one key head: every rank needs it, and it travels with the others
            operands[index] = (operands[index][0], ("h",), *operands[index][2:])
            resize["operand", index, "h"] = Resize(lambda p: p.quotient(group), links=False)
    for shape in call.operand_shapes[3:]:
        operands.append(dims("bhst"[4 - len(shape) :], shape))
    sizes = {f: size for f, size in names.items() if size != 1}
    roles = {"heads": "h", "queries": "s", "keys": "t", "batch": "b"}
    return OpRule(
        tuple(operands),
        (dims("bhse", call.result_shapes[0]),),
        sizes,
        whole=frozenset({"t", "d", *("s" if call.argument("is_causal") else "")} & set(sizes)),
        resize=resize,
        roles={role: f for role, f in roles.items() if f in sizes},
        heavy=True,
    )


def _key_head_of(call: OpCall, local: Local) -> list[int]:
    """For each local query head, the local index of the key head it reads."""
    group = call.operand_shapes[0][1] // call.operand_shapes[1][1]
    if local.decision.factor != "h":
        return [i // group for i in range(call.operand_shapes[0][1])]
    queries = [i for lo, hi in local.decision.partition.owned[local.rank] for i in range(lo, hi)]
    keys = [i for lo, hi in local.decision.partition.quotient(group).owned[local.rank] for i in range(lo, hi)]
    return [keys.index(i // group) for i in queries]


def _attention_local(call: OpCall, local: Local) -> Any:
    heads = _key_head_of(call, local)
    num_keys = max(heads, default=0) + 1
    repeated = call.target is torch.ops.sptransform.attention.default
    per_key = max(len(heads) // num_keys, 1)
    uniform = heads == [i // per_key for i in range(len(heads))]
    dropout_p = call.argument("dropout_p")
    is_empty = 0 in local.result_shapes[0]
    if uniform and not repeated and dropout_p == 0.0 and not is_empty:
        return local.run(call)
    query, key, value, *mask = local.operands
    arguments = (query, key, value, mask[0] if mask else None, dropout_p, call.argument("is_causal"))
    named = {
        "scale": call.argument("scale"),
        "key_head_of": [] if uniform and per_key == 1 else heads,
        "group_name": local.group if dropout_p else "",
    }
    return local.emit(torch.ops.sptransform.attention.default, arguments, named)


_ATTENTION = OpEntry(attention, _attention_local)

TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.scaled_dot_product_attention.default, _ATTENTION),
    (torch.ops.sptransform.attention.default, _ATTENTION),
]
