"""``check_rule``: whether a sharding rule is right, by running the op on shards and comparing with one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sptransform.compiler.custom import checked_rules
from sptransform.compiler.rewrite import arguments_of
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.rules.rule import RuleFn
from sptransform.rules.table import OpEntry, RuleTable, overload_of
from sptransform.testing.brute_force import Case, check_case


def check_rule(
    op: Any, rule: OpEntry | RuleFn, inputs: Mapping[str, Any] | tuple[Any, ...], *, tolerance: float | None = None
) -> tuple[str, ...]:
    """Check ``rule`` on one call of ``op``; returns the factors that it allows to shard.

    Every such factor is cut over 2 and 3 ranks, evenly, unevenly, in intervals, and so that one rank has nothing. Each
    rank runs the op on its shards, in this process. Results and gradients, put together as the rule says, must be those
    of the whole call. Pending sums are tried through the operands in which the rule says the op is linear.

    Under ``torch.no_grad()`` only results are compared.

    Args:
        op: an overload (``torch.ops.mylib.scale.default``), or what ``torch.library.custom_op`` returned.
        rule: as in ``parallelize(.., rules={op: rule})``.
        inputs: positional arguments (a tuple) or keyword arguments (a mapping) of the call, with random values. Take
            float64 where the op has it, and different sizes of 4 and more: no two dims then pass for each other.
        tolerance: relative to an entry, and to the largest one. Default: by the least precise dtype; 1.8e-12 for
            float64.

    Raises:
        AssertionError: the rule is wrong: which factor, cut how, on which rank, and what differs.
        RuleError: the rule does not fit the call.
        UsageError: ``op`` is no op, ``rule`` no rule, or ``inputs`` no arguments.
    """
    if not isinstance(inputs, Mapping | tuple):
        raise UsageError(
            describe("inputs are the arguments of a call", found=type(inputs).__name__, fix="(x,), or {'x': x}")
        )
    table = RuleTable(list(checked_rules({op: rule}).items()))
    args, kwargs = arguments_of(inputs)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    precisions = [torch.finfo(x.dtype).eps for x in tensors if x.is_floating_point() or x.is_complex()]
    tolerance = max(precisions, default=0.0) ** 0.75 if tolerance is None else tolerance
    case = Case(overload_of(op), args, kwargs, tolerance=tolerance, scaled=True)
    return tuple(check_case(case, table))
