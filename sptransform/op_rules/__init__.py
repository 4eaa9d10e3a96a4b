"""The tables of op knowledge: overload -> sharding rule. ``DEFAULT_RULES`` is their union."""

from __future__ import annotations

from sptransform.op_rules import (
    attention,
    below_autograd,
    complex_numbers,
    convolution,
    creation,
    indexing,
    loss,
    matmul,
    pieces,
    pointwise,
    pooling,
    redistribute,
    reduction,
    resampling,
    scans,
    scatter,
    shape,
)
from sptransform.rules.table import RuleTable

TABLES = (
    attention.TABLE,
    below_autograd.TABLE,
    complex_numbers.TABLE,
    convolution.TABLE,
    creation.TABLE,
    indexing.TABLE,
    loss.TABLE,
    matmul.TABLE,
    pieces.TABLE,
    pointwise.TABLE,
    pooling.TABLE,
    redistribute.TABLE,
    reduction.TABLE,
    resampling.TABLE,
    scans.TABLE,
    scatter.TABLE,
    shape.TABLE,
)

DEFAULT_RULES = RuleTable(*TABLES, default=pointwise.default_entry)
