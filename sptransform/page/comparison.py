"""A Comparison that is also a page and traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sptransform.cost.hardware import HardwareLike, hardware_of
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.page.explanation import chosen_ranks, fields_of
from sptransform.page.files import check_writable
from sptransform.page.render import write_page
from sptransform.page.trace import write_trace
from sptransform.planning import compare as planned
from sptransform.planning import comparison
from sptransform.planning.compare import Progress
from sptransform.planning.resized import Resized, with_formulas
from sptransform.strategies.names import StrategyLike


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

        Raises:
            UsageError: no file can be written there.
        """
        check_writable(path)
        title = title or f"Strategies on {self.world_size} ranks"
        write_page(path, self.options, title=title, hardware=self.hardware)

    def trace(self, path: str | Path, strategy: str | None = None, *, ranks: Sequence[int] | None = None) -> None:
        """Write the simulated step of one strategy as a trace for https://ui.perfetto.dev or chrome://tracing.

        Args:
            path: of the file, JSON.
            strategy: its name in the comparison. Default: the first one.
            ranks: as for :meth:`sptransform.Explanation.trace`.

        Raises:
            UsageError: no file can be written there; no hardware was given, or there is no such rank, or no such
                strategy that can run.
        """
        check_writable(path)
        timelines = {option.name: (option.timeline, option.rank) for option in self.runnable if option.timeline}
        name = next(iter(timelines), None) if strategy is None else strategy
        if name not in timelines:
            found = f"strategy={strategy!r}, hardware={self.hardware!r}"
            names = ", ".join(map(repr, timelines))
            fix = f"one of {names}" if timelines else 'compare(.., hardware="h100-nvlink")'
            raise UsageError(describe("a trace is of a strategy that was simulated", found=found, fix=fix))
        timeline, rank = timelines[name]
        write_trace(timeline, path, chosen_ranks(ranks, self.world_size), rank)


def compare(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    world_size: int,
    hardware: HardwareLike | None = None,
    strategies: Sequence[StrategyLike] | None = None,
    documents: Sequence[int] | Sequence[Sequence[int]] | None = None,
    resized: Resized | None = None,
    progress: Progress = lambda name, done, of: None,
    **options: Any,
) -> Comparison:
    """Return what every strategy would send, compute and hold in one training step of ``model``, side by side.

    ``print`` it, ``rich.print`` it, take ``to_dict()``, or write ``html(path)`` and ``trace(path)``. The model is
    captured once, and not run or changed; it may live on ``meta``. Where ranks differ, as where something does not
    divide, the busiest one is shown.

    Args:
        model: the unmodified module.
        inputs: keyword arguments (a mapping) or positional ones (a tuple) of the model's forward.
        world_size: the number of ranks.
        hardware: the name of a known machine, the path of a file with another, or a
            :class:`~sptransform.cost.hardware.Hardware`: a step's time is then simulated. Without it, strategies are
            ranked by the bytes that they send.
        strategies: as for :func:`sptransform.parallelize`; pairs and USP are shown on every mesh of ``world_size``
            ranks. Default: every strategy of this library, and those of sequences with tensor parallelism.
        documents: as for :func:`sptransform.explain`.
        resized: (tokens, rows) -> inputs of that size. Counts and times then become formulas in tokens, rows and ranks,
            which the page has sliders for. This counts the model at other sizes too, and takes ten times as long.
        progress: called with the name of each strategy, how many are done, and of how many.
        options: further options of :func:`sptransform.parallelize`.

    Raises:
        UsageError: an argument is wrong.
        CaptureError: the model cannot be captured.
    """
    found = planned.compare(
        model,
        inputs,
        world_size=world_size,
        hardware=hardware,
        strategies=strategies,
        documents=documents,
        progress=progress,
        **options,
    )
    shown = Comparison(**fields_of(found))
    if resized is None:
        return shown
    machine = None if hardware is None else hardware_of(hardware)
    return replace(shown, options=with_formulas(found, model, resized, hardware=machine, progress=progress, **options))
