"""An Explanation that is also a page and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sptransform.compiler.rewrite import Rewritten
from sptransform.cost.hardware import Hardware
from sptransform.cost.read import step_of
from sptransform.cost.records import Step
from sptransform.cost.simulate import Timeline, simulate
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Strategy
from sptransform.inspection import explanation, reader
from sptransform.inspection.attended_work import Documents
from sptransform.page.files import check_writable
from sptransform.page.render import write_page
from sptransform.page.trace import RANKS, write_trace
from sptransform.planning.candidates import name_of
from sptransform.planning.records import Option
from sptransform.strategies.composed import Composed


@dataclass(frozen=True)
class Explanation(explanation.Explanation):
    """What one rank runs and sends in one training step, with the ways to see it.

    ``print``, ``rich.print``, :meth:`to_dict`, :meth:`html`, :meth:`trace`.

    Attributes:
        hardware: what times are simulated for; None if none are.
        whole: with ``explain(.., expand=True)``, the graph before its rings were expanded, which has a backward.
    """

    hardware: Hardware | None = field(default=None, compare=False)
    whole: Rewritten | None = field(default=None, repr=False, compare=False)

    @cached_property
    def step(self) -> Step:
        """The rank's ops in one training step, forward and backward. Counted."""
        return step_of(self.whole or self.rewritten)

    @cached_property
    def timeline(self) -> Timeline | None:
        """The step on the hardware. Simulated; None without hardware."""
        return None if self.hardware is None else simulate(self.step, self.hardware)

    @cached_property
    def option(self) -> Option:
        """The strategy as a comparison has it."""
        context = self.rewritten.context
        return Option(
            name=short_name(context.strategy),
            strategy=context.strategy,
            mesh=tuple(part.mesh.size for part in context.result.mesh_dims) or (self.world_size,),
            rank=self.rank,
            explanation=replace(self, rewritten=self.whole or self.rewritten),
            pairs=self.attended_pairs,
            step=self.step,
            timeline=self.timeline,
        )

    def html(self, path: str | Path, *, title: str | None = None) -> None:
        """Write all of it as one HTML file that needs no network: layers, graphs, placements, rings, memory, times.

        Args:
            path: of the file.
            title: its heading.

        Raises:
            UsageError: no file can be written there.
        """
        check_writable(path)
        name = None if self.hardware is None else self.hardware.name
        write_page(path, [self.option], title=title or f"{self.option.name} on {self.world_size} ranks", hardware=name)

    def trace(self, path: str | Path, *, ranks: Sequence[int] | None = None) -> None:
        """Write the simulated step as a trace for https://ui.perfetto.dev or chrome://tracing.

        Args:
            path: of the file, JSON.
            ranks: those to draw, each as this rank, since a simulation takes all to do the same. Default: the first
                eight.

        Raises:
            UsageError: no file can be written there, no hardware was given, or there is no such rank.
        """
        check_writable(path)
        if self.timeline is None:
            fix = 'explain(.., hardware="h100-nvlink")'
            raise UsageError(describe("a trace has times, which hardware gives", found="hardware=None", fix=fix))
        write_trace(self.timeline, path, chosen_ranks(ranks, self.world_size), self.rank)


def explanation_of(
    rewritten: Rewritten, documents: Documents | None = None, hardware: Hardware | None = None
) -> Explanation:
    """What the rewritten graph inserts, where, and the bytes it sends; what :func:`explain` returns."""
    return Explanation(**fields_of(reader.explanation_of(rewritten, documents)), hardware=hardware)


def short_name(strategy: Strategy) -> str:
    """``ring x megatron``: the names by which users know strategies."""
    parts = strategy.strategies if isinstance(strategy, Composed) else (strategy,)
    return " x ".join(map(name_of, parts))


def fields_of(found: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, for a class that extends it."""
    return {name: getattr(found, name) for name in found.__dataclass_fields__}


def chosen_ranks(ranks: Sequence[int] | None, world_size: int) -> tuple[int, ...]:
    """The ranks of a trace. Raises UsageError where there is no such rank."""
    if ranks is None:
        return tuple(range(min(RANKS, world_size)))
    if isinstance(ranks, int):
        ranks = [ranks]
    wrong = [rank for rank in ranks if not isinstance(rank, int) or not 0 <= rank < world_size]
    if wrong or not ranks:
        fix = f"ranks from 0 to {world_size - 1}"
        raise UsageError(describe("a trace is of ranks that there are", found=f"ranks={list(ranks)}", fix=fix))
    return tuple(ranks)
