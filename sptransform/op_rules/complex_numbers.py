"""Complex numbers made of real ones, and taken apart again. Arithmetic on them is in the tables of any numbers."""

from __future__ import annotations

from typing import Any

import torch

from sptransform.op_rules.pointwise import LINEAR, pointwise
from sptransform.rules.einsum import rule
from sptransform.rules.rule import RuleFn
from sptransform.rules.table import OpEntry

aten = torch.ops.aten

# Of a pending sum of complex numbers both parts are pending, and the conjugate. The gradient of `polar` is not that of
# a sum, for it takes lengths as positive.
TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten._conj.default, pointwise(LINEAR)),
    (aten.complex.default, pointwise(((0, 1),))),
    (aten.conj.default, pointwise(LINEAR)),
    (aten.imag.default, pointwise(LINEAR)),
    (aten.polar.default, pointwise()),
    (aten.real.default, pointwise(LINEAR)),
    (aten.resolve_conj.default, pointwise(LINEAR)),
    (aten.view_as_complex.default, rule("... part -> ...", replicated="part", linear=LINEAR)),
    (aten.view_as_real.default, rule("... -> ... part", replicated="part", linear=LINEAR)),
]
