"""The tables of op knowledge: overload -> sharding rule. ``DEFAULT_RULES`` is their union."""

from __future__ import annotations

from sptransform.op_rules import (
    attention,
    creation,
    indexing,
    loss,
    matmul,
    pointwise,
    redistribution,
    reduction,
    shape,
)
from sptransform.rule_table import RuleTable

TABLES = (
    attention.TABLE,
    creation.TABLE,
    indexing.TABLE,
    loss.TABLE,
    matmul.TABLE,
    pointwise.TABLE,
    redistribution.TABLE,
    reduction.TABLE,
    shape.TABLE,
)

DEFAULT_RULES = RuleTable(*TABLES, default=pointwise.default_entry)
