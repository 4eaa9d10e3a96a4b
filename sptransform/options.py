"""What a user asks of the compiler, checked once, for `parallelize` and the plain backend alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch._dynamo.backends.registry import list_backends
from torch.distributed.device_mesh import DeviceMesh

from sptransform.errors import UsageError, describe
from sptransform.strategies import Strategy, strategy_of

OUTPUTS = ("dtensor", "full", "local")


@dataclass(frozen=True)
class Options:
    """Options of one compilation; see :func:`sptransform.parallelize` for their meaning."""

    strategy: Strategy | str = "ulysses"
    mesh: DeviceMesh | None = None
    backend: str = "inductor"
    outputs: str = "full"
    grad_sync: bool = True
    strict: bool = False
    sequence_dims: Mapping[str, int] = field(default_factory=dict)

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
        for name, dim in self.sequence_dims.items():
            if not isinstance(name, str) or not isinstance(dim, int):
                raise UsageError(
                    describe("sequence_dims maps input names to dims", found=f"{name!r}: {dim!r}", fix="{'x': 1}")
                )

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
