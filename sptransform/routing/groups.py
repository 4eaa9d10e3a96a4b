"""What a graph shows about the group that each row is in: where groups end once rows are sorted, and how many exist.

Numbers of groups are followed through ops that only move them or change their dtype. Two tensors with one source have
the same numbers, each as often; so counts of one are counts of the other.
"""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.op_rules.data_order import COUNTS, JOINS, PICKS, READS, SORTS
from sptransform.op_rules.mask_ops import PIECES
from sptransform.op_rules.rearrangement import REARRANGEMENTS
from sptransform.routing.positions import is_unchanged, positions
from sptransform.rules.table import RuleTable

aten = torch.ops.aten


def source(numbers: fx.Node, num_groups: int) -> fx.Node:
    """The first tensor with the same numbers below ``num_groups``, each as often, in any order and dtype."""
    while (before := _same_numbers(numbers, num_groups)) is not None:
        numbers = before
    return numbers


def _same_numbers(node: fx.Node, num_groups: int) -> fx.Node | None:
    if (sort := _sort_of(node)) is not None:
        return dataflow.operands(sort)[0]
    if is_unchanged(node):
        return dataflow.operands(node)[0] if _holds(dataflow.value(node).dtype, num_groups) else None
    if node.target in REARRANGEMENTS:
        (before,) = dataflow.operands(node)[:1]
        return before if prod(dataflow.shape(before)) == prod(dataflow.shape(node)) else None
    return None


def _sort_of(node: fx.Node) -> fx.Node | None:
    """The sort of which ``node`` is what it sorted, returned by the sort or read at its permutation."""
    picked = dataflow.projection(node)
    if picked is not None:
        sort, index = picked
        return sort if sort.target in SORTS and index != SORTS[sort.target] else None
    place = READS[node.target](op_call(node)) if node.target in READS else None
    if place is None or len(dataflow.shape(node)) != 1:
        return None
    x, permutation = dataflow.operands(node)[0], dataflow.operands(node)[place.index]
    sort, index = dataflow.projection(permutation) or (permutation, 0)
    return sort if SORTS.get(sort.target) == index and dataflow.operands(sort)[0] is x else None


def _holds(dtype: torch.dtype, num_groups: int) -> bool:
    """Whether the dtype has every number below ``num_groups``."""
    if dtype.is_floating_point:
        return num_groups <= 2 / torch.finfo(dtype).eps
    return dtype != torch.bool and num_groups <= torch.iinfo(dtype).max


def counted_up_to(ends: fx.Node, num_groups: int, rules: RuleTable) -> fx.Node | None:
    """The source of the numbers of which ``ends`` counts those up to 0, 1 ..; None if it is not known to count any."""
    ends = _as_counted(ends)
    if ends.target is aten.cumsum.default:
        counts = _as_counted(dataflow.operands(ends)[0])
        if counts.target in COUNTS and COUNTS[counts.target](op_call(counts)) == num_groups:
            return source(dataflow.operands(counts)[0], num_groups)
    if ends.target is aten.searchsorted.Tensor and _searches_all(ends, num_groups, rules):
        return source(dataflow.operands(ends)[0], num_groups)
    return None


def _searches_all(search: fx.Node, num_groups: int, rules: RuleTable) -> bool:
    """Whether it finds, for each of the numbers 0, 1 .., how many numbers of a sorted list are at most that."""
    call = op_call(search)
    numbers, wanted, *sorter = dataflow.operands(search)
    sort, counted = _sort_of(numbers), positions(wanted, rules)
    if sorter or sort is None or not is_ascending(sort) or counted is None or counted.step != 1:
        return False
    return (call.argument("right") or call.argument("side") == "right") and call.operand_shapes[1] == (num_groups,)


def _as_counted(node: fx.Node) -> fx.Node:
    while is_unchanged(node):
        node = dataflow.operands(node)[0]
    return node


def is_ascending(sort: fx.Node) -> bool:
    return not op_call(sort).argument("descending")


def are_below(numbers: fx.Node, num_groups: int) -> bool:
    """Whether all numbers are known to be at least 0 and below ``num_groups``: as indices of so many entries."""
    picked = dataflow.projection(numbers)
    node, index = picked if picked is not None else (numbers, 0)
    operands = dataflow.operands(node)
    if PICKS.get(node.target) == index:
        dim, shape = op_call(node).argument("dim"), dataflow.shape(operands[0])
        size = prod(shape) if dim is None else shape[dim]
        return isinstance(size, int) and size <= num_groups
    if node.target is aten.remainder.Scalar:
        number = op_call(node).argument("other")
        return isinstance(number, int) and 0 < number <= num_groups
    if node.target in JOINS:
        return all(are_below(x, num_groups) for x in operands)
    if not _holds(dataflow.value(numbers).dtype, num_groups):
        return False
    moves = node.target in REARRANGEMENTS or node.target in READS or node.target in SORTS or node.target in PIECES
    return (moves or is_unchanged(node)) and are_below(operands[0], num_groups)
