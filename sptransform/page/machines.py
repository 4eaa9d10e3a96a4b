"""The same steps on every machine that the library knows, so that a page can switch between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sptransform.cost.hardware import hardware_names, hardware_of
from sptransform.cost.records import Step
from sptransform.cost.simulate import simulate
from sptransform.diagnostics.errors import UsageError
from sptransform.planning.records import Option


def on_machines(options: Sequence[Option], chosen: str | None) -> dict[str, list[list[float] | None]]:
    """Machine -> for each option, simulated seconds of the step and those that wait for others.

    None where an option is blocked, and where a machine lacks what the step needs, as links between nodes. The chosen
    machine is first; it may be one of a file of the user's.
    """
    found: dict[str, list[list[float] | None]] = {}
    if chosen is None:
        return found
    known = {option.timeline.hardware: option.timeline for option in options if option.timeline}
    for name in dict.fromkeys((chosen, *hardware_names())):
        if name in known:
            found[name] = [_rounded(o.timeline) if o.timeline else None for o in options]
        else:
            found[name] = [None if option.step is None else _times(option.step, name) for option in options]
    return {name: times for name, times in found.items() if any(times)}


def _times(step: Step, name: str) -> list[float] | None:
    try:
        return _rounded(simulate(step, hardware_of(name)))
    except UsageError:  # this machine cannot run it
        return None


def _rounded(timeline: Any) -> list[float]:
    return [float(f"{timeline.seconds:.6g}"), float(f"{timeline.exposed_seconds:.6g}")]
