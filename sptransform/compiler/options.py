"""The user's options, checked once, for both `parallelize` and the plain backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from torch._dynamo.backends.registry import list_backends
from torch.distributed.device_mesh import DeviceMesh

from sptransform.agreement.replicas import CHECKS
from sptransform.compiler.custom import checked_rules, identified_passes, identified_rules
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.pass_manager import Pass
from sptransform.engine.pipeline import Pipeline
from sptransform.op_rules import DEFAULT_RULES
from sptransform.passes import PIPELINE
from sptransform.rules.rule import RuleFn
from sptransform.rules.table import OpEntry, RuleTable
from sptransform.strategies.names import StrategyLike, strategy_of

OUTPUTS = ("dtensor", "full", "local", "loss")


@dataclass(frozen=True)
class Options:
    """Options of one compilation; see :func:`sptransform.frontend.parallelize` for their meaning."""

    strategy: StrategyLike = "ulysses"
    mesh: DeviceMesh | None = None
    backend: str = "inductor"
    outputs: str = "full"
    grad_sync: bool = True
    strict: bool = False
    shard_parameters: bool = False
    sequence_dims: Mapping[str, int] = field(default_factory=dict)
    check_timeout: float = 300.0
    rules: Mapping[Any, OpEntry | RuleFn] = field(default_factory=dict)
    passes: Sequence[Pass] = ()
    loss_chunk: int | str | None = "auto"
    check_replicas: str = "first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", strategy_of(self.strategy))
        if self.outputs not in OUTPUTS:
            raise UsageError(
                describe("unknown outputs", found=repr(self.outputs), fix=f"one of {', '.join(map(repr, OUTPUTS))}")
            )
        if self.backend not in (known := list_backends(exclude_tags=())) or self.backend == "sptransform":
            raise UsageError(
                describe("unknown inner backend", found=repr(self.backend), fix=f"one of {', '.join(sorted(known))}")
            )
        for name in ("grad_sync", "strict", "shard_parameters"):
            if not isinstance(value := getattr(self, name), bool):
                raise UsageError(describe(f"{name} is a bool", found=repr(value), fix="True or False"))
        if self.shard_parameters and self.strategy.shards_weights:
            found = f"{self.strategy}, which cuts parameters along its own dimensions"
            raise UsageError(
                describe("shard_parameters does not go with this", found=found, fix="shard_parameters=False")
            )
        if not isinstance(self.check_timeout, int | float) or not self.check_timeout > 0:
            raise UsageError(
                describe("check_timeout is a number of seconds", found=repr(self.check_timeout), fix="300.0")
            )
        is_number = isinstance(self.loss_chunk, int) and not isinstance(self.loss_chunk, bool) and self.loss_chunk > 0
        if not is_number and self.loss_chunk not in ("auto", None):
            raise UsageError(
                describe("loss_chunk is a number of tokens", found=repr(self.loss_chunk), fix="1024, 'auto' or None")
            )
        if self.check_replicas not in CHECKS:
            fix = f"one of {', '.join(map(repr, CHECKS))}"
            raise UsageError(describe("unknown check_replicas", found=repr(self.check_replicas), fix=fix))
        if not isinstance(self.sequence_dims, Mapping):
            raise UsageError(
                describe("sequence_dims maps input names to dims", found=repr(self.sequence_dims), fix="{'x': 1}")
            )
        object.__setattr__(self, "sequence_dims", dict(self.sequence_dims))
        for name, dim in self.sequence_dims.items():
            if not isinstance(name, str) or not isinstance(dim, int) or isinstance(dim, bool):
                raise UsageError(
                    describe("sequence_dims maps input names to dims", found=f"{name!r}: {dim!r}", fix="{'x': 1}")
                )

        object.__setattr__(self, "rules", checked_rules(self.rules))
        if not isinstance(self.passes, list | tuple):
            raise UsageError(describe("passes is a list of passes", found=repr(self.passes), fix="[YourPass()]"))
        object.__setattr__(self, "passes", tuple(self.passes))
        _ = self.pipeline  # its errors are raised here

    @cached_property
    def rule_table(self) -> RuleTable:
        """Our rules, and before them the user's."""
        return DEFAULT_RULES.with_rules(self.rules) if self.rules else DEFAULT_RULES

    @cached_property
    def pipeline(self) -> Pipeline:
        """Our passes, and between them the user's."""
        return PIPELINE.with_passes(self.passes)

    @cached_property
    def custom(self) -> dict[str, str]:
        """The user's rules and passes as texts, equal in all processes that have the same."""
        return {"rules": identified_rules(self.rules), "passes": identified_passes(self.passes)}

    @property
    def keeps_parts(self) -> bool:
        """Whether each rank keeps a part of every parameter it can."""
        return self.shard_parameters or self.strategy.shards_weights

    @staticmethod
    def of(given: Mapping[str, Any]) -> Options:
        """Options from the dict a user passed. Raises UsageError naming an unknown key."""
        known = [f.name for f in fields(Options)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UsageError(
                describe(f"unknown option {unknown[0]!r}", found=", ".join(unknown), fix=f"one of {', '.join(known)}")
            )
        return replace(Options(), **given)
