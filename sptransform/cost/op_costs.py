"""Tables of what ops cost, for ops of which shapes alone do not say it; everything else is read and written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from sptransform.graph import dataflow
from sptransform.ops.flops import attention_flops, block_pairs

aten, c10d, sp = torch.ops.aten, torch.ops._c10d_functional, torch.ops.sptransform

# op -> whether it is a backward. All have arguments query, key and value, [B, H, S, D]
ATTENTION: dict[Any, bool] = {
    aten._scaled_dot_product_flash_attention_for_cpu: False,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: True,
    aten._scaled_dot_product_flash_attention: False,
    aten._scaled_dot_product_flash_attention_backward: True,
    aten._scaled_dot_product_efficient_attention: False,
    aten._scaled_dot_product_efficient_attention_backward: True,
    aten._scaled_dot_product_cudnn_attention: False,
    aten._scaled_dot_product_cudnn_attention_backward: True,
    aten._scaled_dot_product_fused_attention_overrideable: False,
    aten._scaled_dot_product_fused_attention_overrideable_backward: True,
    sp.attention_block: False,
    sp.attention_block_backward: True,
    sp.attention_block_backward_with_mask: True,
}

# results that are their operand's memory, though the schema does not say so
ALIASES = {aten._unsafe_view, c10d.wait_tensor}

# op -> operands in whose memory the results are when it runs; in the graph it returns new tensors
UPDATES: dict[Any, tuple[int, ...]] = {
    sp.merge_block: (0, 1),
    sp.add_block: (0,),
    sp.add_to_message: (0,),
    sp.add_to_operand: (0,),
}

# ops whose messages go to one neighbour
HOPS = {sp.ring_attention, sp.ring_attention_backward}

# ops that read no more of their first operand than they return
PICKS = {aten.embedding, aten.gather, aten.index, aten.index_select, sp.local_slice}

# aten ops that Inductor does not fuse with what surrounds them
UNFUSED = {
    aten.sort,
    aten.topk,
    aten.cumsum,
    aten.cumprod,
    aten.scatter,
    aten.scatter_add,
    aten.scatter_reduce,
    aten.index_put,
    aten.index_add,
    aten.embedding_dense_backward,
    aten.nonzero,
    aten.bincount,
    aten.searchsorted,
}


def _exponentials(x: Tensor, *args: Any, **kwargs: Any) -> int:
    return num_bytes(x)


def _cast_to_sum(x: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> int:
    """Integers are cast before they are added up; CUDA adds up 16-bit numbers in float32 as they are."""
    wide = dtype or (x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64)
    as_they_are = wide == x.dtype or (x.device.type == "cuda" and wide == torch.float32 and x.dtype.itemsize == 2)
    return 0 if as_they_are else x.numel() * wide.itemsize


def _cast_to_common(*args: Any, **kwargs: Any) -> int:
    """On a CPU, operands of another dtype than the result's are cast before."""
    tensors = [x for x in args[:2] if isinstance(x, Tensor) and x.device.type == "cpu"]
    wide = torch.result_type(*args[:2])
    return sum(x.numel() * wide.itemsize for x in tensors if x.dtype != wide)


# op -> bytes that torch's kernel of it holds while it runs, beyond operands and results, as a function of its arguments
INNER: Mapping[Any, Callable[..., int]] = {
    aten.add: _cast_to_common,
    aten.div: _cast_to_common,
    aten.logsumexp: _exponentials,
    aten.mul: _cast_to_common,
    aten.sub: _cast_to_common,
    aten.sum: _cast_to_sum,
}


def sent_by(node: torch.fx.Node, num_ranks: int, rank: int) -> tuple[str, int] | None:
    """(kind, bytes that ``rank`` of the group sends) of a node that starts a collective; None for any other node."""
    read = _SENT.get(getattr(node.target, "overloadpacket", None))
    return None if read is None else read(node, num_ranks, rank)


def group_name(node: torch.fx.Node) -> str:
    """The process group of a collective, which is its last argument."""
    return node.args[-1]


def _num_bytes(node: torch.fx.Node) -> int:
    return num_bytes(dataflow.value(node.args[0]))


def num_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _all_to_all(node: torch.fx.Node, num_ranks: int, rank: int) -> tuple[str, int]:
    _, _, sent, _ = node.args
    return "all_to_all", (sum(sent) - sent[rank]) * dataflow.value(node.args[0]).element_size()


_SENT: Mapping[Any, Callable[[torch.fx.Node, int, int], tuple[str, int]]] = {
    c10d.all_reduce: lambda node, n, rank: ("all_reduce", 2 * _num_bytes(node) * (n - 1) // n),
    c10d.all_gather_into_tensor: lambda node, n, rank: ("all_gather", _num_bytes(node) * (n - 1)),
    c10d.reduce_scatter_tensor: lambda node, n, rank: ("reduce_scatter", _num_bytes(node) // n * (n - 1)),
    c10d.all_to_all_single: _all_to_all,
}


def flops_of(node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """What the op computes, by torch's own formulas; of attention, visible pairs only. 0 where there is no formula."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in ATTENTION:
        sizes = attention_sizes(node, args, kwargs)
        query = sizes["batch"], sizes["heads"], sizes["queries"], sizes["dim"]
        return attention_flops(query, (0, 0, 0, sizes["value_dim"]), sizes["pairs"], backward=ATTENTION[packet])
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=dataflow.value(node)))


def attention_sizes(node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """The sizes of one attention, and its visible pairs of a query and a key in one head of one row."""
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = (given[name].shape for name in ("query", "key", "value"))
    if "is_causal" in given:
        # torch's triangle begins at the first query and the first key
        pairs = query[2] * key[2]
        if given["is_causal"]:
            beyond = max(0, query[2] - key[2])
            seen = query[2] - beyond
            pairs = seen * (seen + 1) // 2 + beyond * key[2]
    else:
        pairs = block_pairs(
            query[2], key[2], causal=bool(given.get("causal")), sliding=bool(given.get("sliding", False))
        )
    return {
        "batch": query[0],
        "heads": query[1],
        "key_heads": key[1],
        "queries": query[2],
        "keys": key[2],
        "dim": query[3],
        "value_dim": value[3],
        "pairs": pairs,
    }


def matmul_sizes(args: tuple[Any, ...]) -> dict[str, int]:
    """The sizes of a product of the last two matrices among the arguments; empty for other products."""
    matrices = [x.shape for x in args if isinstance(x, Tensor) and x.dim() >= 2]
    if len(matrices) < 2 or matrices[-2][-1] != matrices[-1][-2]:
        return {}
    first, second = matrices[-2:]
    return {"m": first[-2], "n": second[-1], "k": first[-1], "batch": prod(first[:-2])}
