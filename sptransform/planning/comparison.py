"""Strategies side by side, with the ways to see them: ``print``, ``rich.print``, ``to_dict``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from sptransform.cost.reserved import reserved_bytes
from sptransform.inspection import pages
from sptransform.planning.pages import sections
from sptransform.planning.records import ComparisonFacts, Option


@dataclass(frozen=True)
class Comparison(ComparisonFacts):
    """The :class:`ComparisonFacts`, with the ways to see them."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for ``json.dumps``; bytes, seconds, and FLOPs as 2 for each multiply-add."""
        return {
            "world_size": self.world_size,
            "hardware": self.hardware,
            "one_device": {"flops": self.one_device.flops(), "peak_bytes": self.one_device.peak_bytes()},
            "options": [_plain(option) for option in self.options],
        }

    def __str__(self) -> str:
        return pages.plain(sections(self))

    def __rich__(self) -> RenderableType:
        return pages.rich(sections(self))


def _plain(option: Option) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": option.name,
        "strategy": str(option.strategy),
        "mesh": list(option.mesh),
        "blocked": option.blocked,
    }
    step, timeline = option.step, option.timeline
    if step is None or option.explanation is None:
        return data
    for direction in ("forward", "backward"):
        data[direction] = {
            "messages": step.messages(direction),
            "bytes_sent": step.bytes_sent(direction),
            "flops": step.flops(direction),
        }
    data |= {
        "rank": option.rank,
        "imbalance": option.imbalance,
        "kernels": option.kernels,
        "peak_bytes": option.peak_bytes,
        "reserved_bytes": reserved_bytes(step),
        "parameter_bytes": step.parameters,
        "fallbacks": [fallback.op for fallback in option.explanation.fallbacks],
        "formulas": {name: {"is": str(f.expression), "holds": f.holds} for name, f in option.formulas.items()},
    }
    if timeline is not None:
        data |= {"seconds": timeline.seconds, "exposed_seconds": timeline.exposed_seconds}
    return data
