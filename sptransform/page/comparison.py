"""A Comparison that is also a page and traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.page.explanation import chosen_ranks, fields_of
from sptransform.page.render import write_page
from sptransform.page.trace import write_trace
from sptransform.planning import compare as planned
from sptransform.planning import comparison


@dataclass(frozen=True)
class Comparison(comparison.Comparison):
    """Strategies side by side, with the ways to see them.

    ``print``, ``rich.print``, :meth:`to_dict`, :meth:`html`, :meth:`trace`.
    """

    def html(self, path: str | Path, *, title: str | None = None) -> None:
        """Write all of it as one HTML file that needs no network: strategies side by side, and sliders.

        Args:
            path: of the file.
            title: its heading.
        """
        title = title or f"Strategies on {self.world_size} ranks"
        write_page(path, self.options, title=title, hardware=self.hardware)

    def trace(self, path: str | Path, strategy: str | None = None, *, ranks: Sequence[int] | None = None) -> None:
        """Write the simulated step of one strategy as a trace for https://ui.perfetto.dev or chrome://tracing.

        Args:
            path: of the file, JSON.
            strategy: its name in the comparison. Default: the first one.
            ranks: as for :meth:`sptransform.Explanation.trace`.

        Raises:
            UsageError: no hardware was given, or there is no such rank, or no such strategy that can run.
        """
        timelines = {option.name: (option.timeline, option.rank) for option in self.runnable if option.timeline}
        name = next(iter(timelines), None) if strategy is None else strategy
        if name not in timelines:
            found = f"strategy={strategy!r}, hardware={self.hardware!r}"
            names = ", ".join(map(repr, timelines))
            fix = f"one of {names}" if timelines else 'compare(.., hardware="h100-nvlink")'
            raise UsageError(describe("a trace is of a strategy that was simulated", found=found, fix=fix))
        timeline, rank = timelines[name]
        write_trace(timeline, path, chosen_ranks(ranks, self.world_size), rank)


@wraps(planned.compare)
def compare(*args: Any, **kwargs: Any) -> Comparison:
    return Comparison(**fields_of(planned.compare(*args, **kwargs)))
