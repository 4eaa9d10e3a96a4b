"""A Comparison as a page: its sections."""

from __future__ import annotations

from collections.abc import Iterator

from sptransform.cost.records import Step
from sptransform.inspection.pages import Row, Section
from sptransform.planning.records import ComparisonFacts, Option
from sptransform.planning.units import quantity, seconds, size

_TIMES = ("strategy", "step", "exposed", "sent forward", "sent backward", "messages")
_WORK = ("strategy", "FLOPs", "of one device", "over the mean", "kernels", "peak memory")


def sections(facts: ComparisonFacts) -> list[Section]:
    """The strategies that run, the best first; then what blocks the others."""
    found = (_times(facts), _work(facts), _formulas(facts), _blocked(facts))
    return [section for section in found if section.rows]


def _times(facts: ComparisonFacts) -> Section:
    on = "" if facts.hardware is None else f" of {facts.hardware}"
    rows = [_times_of(option, option.step) for option in facts.runnable if option.step]
    title = f"One training step on {facts.world_size} ranks{on}: what the busiest rank sends, and the time"
    return Section(title, _TIMES, rows, list(_sentences(facts)), frozenset(_TIMES[1:]))


def _times_of(option: Option, step: Step) -> Row:
    timeline = option.timeline
    return (
        option.name,
        *(("-", "-") if timeline is None else (seconds(timeline.seconds), seconds(timeline.exposed_seconds))),
        size(step.bytes_sent("forward")),
        size(step.bytes_sent("backward")),
        f"{step.messages('forward'):,} + {step.messages('backward'):,}",
    )


def _work(facts: ComparisonFacts) -> Section:
    one = max(facts.one_device.flops(), 1)
    rows = [
        (
            option.name,
            quantity(option.step.flops()),
            f"{option.step.flops() * facts.world_size / one:.0%}",
            f"{option.imbalance:+.1%}",
            f"{option.kernels:,}",
            size(option.peak_bytes),
        )
        for option in facts.runnable
        if option.step
    ]
    notes = [
        "Of one device: the FLOPs of the rank times the ranks, of those of the model on one device.",
        "Over the mean: the attention of the busiest rank. Peak memory: without optimizer states.",
    ]
    return Section("What it computes and holds", _WORK, rows, notes, frozenset(_WORK[1:]))


def _sentences(facts: ComparisonFacts) -> Iterator[str]:
    if facts.hardware is None:
        yield "Ranked by bytes, for no hardware was given."
    else:
        yield "Times are simulated; exposed: communication that no computation hides. All else is counted."
    others = [option for option in facts.runnable if option.rank]
    if others:
        yield f"The busiest rank is not rank 0: {', '.join(f'{o.name}: rank {o.rank}' for o in others)}."


def _formulas(facts: ComparisonFacts) -> Section:
    rows = [
        (option.name, name, str(formula.expression), formula.holds)
        for option in facts.runnable
        for name, formula in option.formulas.items()
    ]
    return Section("Formulas: S tokens, B rows, N ranks", ("strategy", "count", "is", "where"), rows)


def _blocked(facts: ComparisonFacts) -> Section:
    rows = [(option.name, option.blocked) for option in facts.options if option.blocked is not None]
    return Section("Cannot run this model", ("strategy", "because"), rows)
