"""Sequence-parallel training of unmodified transformers: a compiler from one device to many."""

from sptransform.compiler.rewrite import Rewritten, rewrite
from sptransform.diagnostics.errors import (
    CaptureError,
    RankError,
    RankFailedError,
    RankLostError,
    RankMissingError,
    RuleError,
    ScheduleMismatchError,
    SPTransformError,
    UnsupportedOpError,
    UsageError,
    VerificationError,
)
from sptransform.engine.strategy import Strategy
from sptransform.frontend.parallelize import parallelize
from sptransform.inspection.explain import explain
from sptransform.inspection.explanation import Explanation
from sptransform.inspection.reader import explanation_of
from sptransform.strategies.megatron import MegatronSP
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP

__all__ = [
    "USP",
    "AllGatherKV",
    "CaptureError",
    "Explanation",
    "MegatronSP",
    "RankError",
    "RankFailedError",
    "RankLostError",
    "RankMissingError",
    "Rewritten",
    "Ring",
    "RuleError",
    "SPTransformError",
    "ScheduleMismatchError",
    "Strategy",
    "Ulysses",
    "UnsupportedOpError",
    "UsageError",
    "VerificationError",
    "explain",
    "explanation_of",
    "parallelize",
    "rewrite",
]
