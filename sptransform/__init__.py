"""Sequence-parallel training of unmodified transformers: a compiler from one device to many."""

# ruff: noqa: E402 - another torch may lack what the imports below need, and is to be named before that fails
from sptransform.diagnostics.torch_version import check_torch_version

check_torch_version()

from sptransform import testing
from sptransform.compiler.rewrite import Rewritten, rewrite
from sptransform.diagnostics.errors import (
    CaptureError,
    RankError,
    RankFailedError,
    RankLostError,
    RankMissingError,
    ReplicaMismatchError,
    RuleError,
    ScheduleMismatchError,
    SPTransformError,
    UnsupportedOpError,
    UsageError,
    VerificationError,
)
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.engine.pipeline import Pipeline
from sptransform.engine.strategy import Strategy
from sptransform.frontend.parallelize import parallelize
from sptransform.page.comparison import Comparison, compare
from sptransform.page.explain import explain
from sptransform.page.explanation import Explanation, explanation_of
from sptransform.parameters.broadcast import broadcast_parameters
from sptransform.passes import PIPELINE
from sptransform.planning.auto import Auto
from sptransform.rules.decision import Decision, Sharded
from sptransform.rules.einsum import rule
from sptransform.rules.rule import OpCall, OpRule
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.partition import Partition
from sptransform.strategies.megatron import MegatronSP
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP
from sptransform.testing.verdict import Compared, Verdict
from sptransform.testing.verify import verify

__all__ = [
    "PIPELINE",
    "USP",
    "AllGatherKV",
    "Auto",
    "CaptureError",
    "Compared",
    "Comparison",
    "Context",
    "Decision",
    "Explanation",
    "Local",
    "MegatronSP",
    "OpCall",
    "OpEntry",
    "OpRule",
    "Partition",
    "Pass",
    "Pipeline",
    "RankError",
    "RankFailedError",
    "RankLostError",
    "RankMissingError",
    "ReplicaMismatchError",
    "Rewritten",
    "Ring",
    "RuleError",
    "SPTransformError",
    "ScheduleMismatchError",
    "Sharded",
    "Strategy",
    "Ulysses",
    "UnsupportedOpError",
    "UsageError",
    "Verdict",
    "VerificationError",
    "broadcast_parameters",
    "compare",
    "explain",
    "explanation_of",
    "parallelize",
    "rewrite",
    "rule",
    "testing",
    "verify",
]
