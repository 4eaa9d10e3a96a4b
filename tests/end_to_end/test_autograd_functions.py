"""Models with custom autograd.Functions equal one device under every strategy; what can be cut is, without a gather."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from sptransform import rule
from sptransform.diagnostics.errors import UnsupportedOpError
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.functions import CALLS, Accumulated, model_of
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64
from tests.support.rewritten import Asked, Ranks, on_pretended_ranks
from tests.support.tiers import INDUCTOR, tiered

ASKED = [*(Asked(n, name) for name in ("ulysses", "ring", "megatron") for n in (2, 3)), Asked((2, 2), "usp")]
FEW = [Asked(2, "megatron"), Asked(3, "ring")]
QUICK = ["checkpointed", "clipped"]

# what runs whole, since each rank's part of it is not a part of the function
WHOLE = {
    "across_tokens": "AcrossTokens",
    "by_position": "ByPosition",
    "cross_entropy": "CrossEntropy",
    "linear_cross_entropy": "LinearCrossEntropy",
    "accumulated": "Accumulated",
}


def assert_exact(model: nn.Module, inputs: dict[str, Any], asked: list[Asked], **options: Any) -> dict[Asked, Ranks]:
    reference = run_one_device(model, inputs)
    model.zero_grad()
    found = on_pretended_ranks(model, inputs, asked, **options)
    for ranks in found.values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)
    return found


@pytest.mark.parametrize("name", tiered(CALLS, quick=QUICK))
def test_equal_to_one_device(name: str) -> None:
    model, inputs = model_of(name)
    quick = name in QUICK
    for asked, ranks in assert_exact(model, inputs, FEW if quick else ASKED).items():
        fallbacks = [x.op.rpartition(".")[2] for x in ranks.context.result.fallbacks]
        assert fallbacks == ([WHOLE[name]] if name in WHOLE else []), asked


@pytest.mark.slow
@pytest.mark.parametrize("length", [13, 17])
def test_lengths_that_do_not_divide(length: int) -> None:
    for name in ("affine", "checkpointed", "cross_entropy", "rotary"):
        assert_exact(*model_of(name, length), ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_through_aot_autograd(name: str) -> None:
    assert_exact(*model_of(name), FEW, compiler=lookup_backend("aot_eager"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_on_real_ranks(backend: str) -> None:
    get_pool(2).run(step_on_rank, backend, timeout=280)


def step_on_rank(rank: int, world_size: int, backend: str) -> None:
    import sptransform

    tolerance = FLOAT64 if backend != "inductor" else 1e-6
    for name in ("checkpointed", "cross_entropy", "affine"):
        model, inputs = model_of(name)
        reference = run_one_device(model, inputs)
        model.zero_grad()
        sptransform.parallelize(model, "ring", backend=backend)
        assert_equal_to_one_device(reference, run_one_device(model, inputs), tolerance)


def test_a_rule_of_the_user_is_for_the_class() -> None:
    model, inputs = model_of("accumulated")
    named = r"(?s)Accumulated has no .*fix: .*rules=\{tests.support.functions.Accumulated"
    with pytest.raises(UnsupportedOpError, match=named):
        on_pretended_ranks(model, inputs, FEW, strict=True)
    rules = {Accumulated: rule("b s h, h -> b s h", replicated="h")}
    for ranks in assert_exact(model, inputs, FEW, rules=rules, strict=True).values():
        assert ranks.context.result.fallbacks == []
