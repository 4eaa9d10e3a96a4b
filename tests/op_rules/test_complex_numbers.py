"""Complex numbers made of real ones, taken apart, and multiplied as rotary embeddings do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.brute_force import Case, case, check_case, ids, positive, randn

aten = torch.ops.aten


def _complex(*shape: int) -> Tensor:
    return torch.complex(randn(*shape), randn(*shape).flip(0))


QUICK = [
    case(aten.view_as_complex.default, randn(4, 6, 2), factors=".1 .2"),
    case(aten.view_as_real.default, _complex(4, 6), factors=".1 .2"),
    case(aten.mul.Tensor, _complex(2, 4, 6), _complex(4, 6)),
]

CASES = [
    case(aten._conj.default, _complex(4, 6)),
    case(aten.complex.default, randn(4, 6), randn(4, 1)),
    case(aten.complex.default, randn(4, 6), randn(6), factors=".1 .2"),
    case(aten.conj.default, _complex(4, 6)),
    case(aten.imag.default, _complex(4, 6)),
    case(aten.polar.default, positive(4, 6), randn(4, 6)),
    case(aten.real.default, _complex(4, 6)),
    case(aten.resolve_conj.default, _complex(4, 6).conj()),
    case(aten.view_as_complex.default, randn(2)),
    *QUICK,
]

ARITHMETIC = [
    case(aten.add.Tensor, _complex(4, 6), _complex(6)),
    case(aten.div.Tensor, _complex(4, 6), positive(6)),
    case(aten.mul.Tensor, randn(4, 6), _complex(4, 1)),
    case(aten.sub.Tensor, _complex(4, 6), randn(6)),
]


@pytest.mark.parametrize("case", QUICK, ids=ids(QUICK))
def test_rule_of_a_rotary_embedding(case: Case) -> None:
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + ARITHMETIC, ids=ids(CASES + ARITHMETIC))
def test_rule(case: Case) -> None:
    check_case(case)
