"""Ops that order rows by data, read or write them in such an order, count them, and multiply them by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sptransform.op_rules import creation, indexing, pieces, pointwise, reduction, scatter, shape
from sptransform.rules.rule import OpCall, Operand
from sptransform.rules.table import OpEntry

aten = torch.ops.aten

# Ops that sort their first operand, and which of their results is the permutation
SORTS: Mapping[Any, int] = {
    aten.argsort.default: 0,
    aten.argsort.stable: 0,
    aten.sort.default: 1,
    aten.sort.stable: 1,
}

# Ops of which a result has indices of the operand's ``dim``, and which result
PICKS: Mapping[Any, int] = {
    **SORTS,
    aten.argmax.default: 0,
    aten.argmin.default: 0,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.topk.default: 1,
}

# Ops whose entries are entries of their operands
JOINS = frozenset({aten.cat.default, aten.stack.default})

# Local forms that depend on how much the rank has, and not on where that is. (Embedding: other dimensions than rows.)
_BY_SIZE = {
    entry.localize
    for file in (creation, indexing, pieces, pointwise, reduction, scatter, shape)
    for _, entry in file.TABLE
    if isinstance(entry, OpEntry)
}
_SUMS_BY_SIZE = {reduction.mean_local, scatter.add_local}


def is_row_by_row(entry: OpEntry) -> bool:
    """Whether any entry along a factor that the op keeps is the same function of its operands' entries there.

    A rule says that every rank computes its part from its parts, whichever these are. So parts of one entry do, too.
    Only a local form might know which entry it has.
    """
    return entry.localize is None or entry.localize in _BY_SIZE


def is_sum_of_rows(entry: OpEntry) -> bool:
    """Whether the order of the entries along a factor that the op sums over does not matter."""
    return entry.localize is None or entry.localize in _SUMS_BY_SIZE


@dataclass(frozen=True)
class Kernel:
    """What a product of sorted rows with the matrices of their groups calls its operands.

    ``rows`` is [n, k], ``weight`` [groups, k, f], and ``ends`` [groups] has the number of rows up to each group's last.
    Other arguments are the default.
    """

    rows: str
    weight: str
    ends: str


# By the name that the op has in whichever library registers it
KERNELS: Mapping[str, Kernel] = {
    "_grouped_mm": Kernel("self", "mat2", "offs"),
    "grouped_mm_fallback": Kernel("input", "weight", "offs"),
}


def kernel_name(target: Any) -> str:
    """The name of an op with its library, as ``aten._grouped_mm``; of anything else, a text that names no op."""
    return str(target).removesuffix(".default")


def kernel_of(target: Any) -> Kernel | None:
    """The kernel that an op is; None if it is none."""
    return KERNELS.get(kernel_name(target).rpartition(".")[2])


def _num_bins(call: OpCall) -> int | None:
    bins, low, high = (call.argument(name) for name in ("bins", "min", "max"))
    return bins if low == 0 and high in (bins - 1, bins) and high > 0 else None


# Ops that count how often each of the numbers 0, 1 .. occurs in their operand: how many numbers; None for other counts
COUNTS: Mapping[Any, Callable[[OpCall], int | None]] = {aten.histc.default: _num_bins}


def _divisor(call: OpCall) -> int | None:
    number = call.args[1]
    is_floor = call.target is aten.floor_divide.default or call.argument("rounding_mode") == "floor"
    return number if isinstance(number, int) and number > 0 and is_floor else None


# The first operand divided by a number and rounded down: by which number; None for other quotients
QUOTIENTS: Mapping[Any, Callable[[OpCall], int | None]] = {
    aten.div.Tensor_mode: _divisor,
    aten.floor_divide.default: _divisor,
}


@dataclass(frozen=True)
class Place:
    """Where an op reads or writes its first operand: along ``dim``, at what operand ``index`` says.

    ``index_dim``: the dimension of the index along which ``dim`` is read or written.
    """

    index: int
    dim: int
    index_dim: int = 0


def _at_list(call: OpCall) -> Place | None:
    """One dimension, at a list of indices."""
    given = [(dim, x.index) for dim, x in enumerate(call.argument("indices")) if isinstance(x, Operand)]
    if len(given) != 1 or len(call.operand_shapes[given[0][1]]) != 1:
        return None
    return Place(given[0][1], given[0][0])


def _at_vector(call: OpCall) -> Place | None:
    ndim = len(call.operand_shapes[0])
    return Place(1, call.argument("dim") % ndim) if ndim and len(call.operand_shapes[1]) == 1 else None


def _at_each(call: OpCall) -> Place | None:
    """Each entry at an index of its own; all entries of the other dimensions are read or written."""
    x, index = call.operand_shapes[:2]
    dim = call.argument("dim") % max(len(x), 1)
    others_agree = x[:dim] == index[:dim] and x[dim + 1 :] == index[dim + 1 :]
    return Place(1, dim, dim) if x and others_agree else None


READS: Mapping[Any, Callable[[OpCall], Place | None]] = {
    aten.gather.default: _at_each,
    aten.index.Tensor: _at_list,
    aten.index_select.default: _at_vector,
}

# Ops that put their last operand there, and that add it
WRITES: Mapping[Any, Callable[[OpCall], Place | None]] = {
    aten.index_put.default: lambda call: None if call.argument("accumulate") else _at_list(call),
    aten.scatter.src: _at_each,
}
ADDS: Mapping[Any, Callable[[OpCall], Place | None]] = {
    aten.index_add.default: lambda call: _at_vector(call) if call.argument("alpha") == 1 else None,
    aten.index_put.default: lambda call: _at_list(call) if call.argument("accumulate") else None,
    aten.scatter_add.default: _at_each,
}
