"""Sequence-parallel training of unmodified transformers: a compiler from one device to many."""

from sptransform.errors import (
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
from sptransform.explain.explain import explain
from sptransform.explain.explanation import Explanation
from sptransform.explain.reading import explanation_of
from sptransform.parallelize import parallelize
from sptransform.rewrite import Rewritten, rewrite
from sptransform.strategies import USP, AllGatherKV, MegatronSP, Ring, Strategy, Ulysses

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
