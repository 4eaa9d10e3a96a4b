"""A Comparison as a page: its sections."""

from __future__ import annotations

from collections.abc import Iterator

from sptransform.inspection.pages import Row, Section
from sptransform.planning.records import ComparisonFacts, Option

_COLUMNS = (
    "strategy",
    "step",
    "exposed",
    "sent forward",
    "sent backward",
    "messages",
    "FLOPs",
    "of one device",
    "over the mean",
    "kernels",
    "peak memory",
)


def sections(facts: ComparisonFacts) -> list[Section]:
    """The strategies that run, the best first; then how they differ where they do; then what blocks the others."""
    return [section for section in (_totals(facts), _formulas(facts), _blocked(facts)) if section.rows]


def _totals(facts: ComparisonFacts) -> Section:
    on = "" if facts.hardware is None else f" of {facts.hardware}"
    return Section(
        f"One training step on {facts.world_size} ranks{on}: what the busiest rank does",
        _COLUMNS,
        [_row(option, facts) for option in facts.runnable],
        list(_sentences(facts)),
        frozenset(_COLUMNS[1:]),
    )


def _row(option: Option, facts: ComparisonFacts) -> Row:
    step, timeline = option.step, option.timeline
    assert step is not None
    times = ("-", "-") if timeline is None else (seconds(timeline.seconds), seconds(timeline.exposed_seconds))
    share = step.flops() * facts.world_size / max(facts.one_device.flops(), 1)
    return (
        option.name,
        *times,
        size(step.bytes_sent("forward")),
        size(step.bytes_sent("backward")),
        f"{step.messages('forward'):,} + {step.messages('backward'):,}",
        quantity(step.flops()),
        f"{share:.0%}",
        f"{option.imbalance:+.1%}",
        f"{option.kernels:,}",
        size(step.peak_bytes()),
    )


def _sentences(facts: ComparisonFacts) -> Iterator[str]:
    if facts.hardware is None:
        yield "Ranked by bytes, for no hardware was given."
    else:
        yield "Times are simulated; exposed: communication that no computation hides. All else is counted."
    yield "Of one device: the FLOPs of the rank, times the ranks, as a share of those of the model on one device."
    yield "Over the mean: the attention of the busiest rank. Peak memory: without optimizer states."
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


def seconds(x: float) -> str:
    """Three digits: ``1.23 s``, ``45.6 ms``, ``78.9 us``."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if x >= factor:
            return f"{x / factor:.3g} {unit}" if x < 1000 * factor else f"{x / factor:,.0f} {unit}"
    return f"{x / 1e-6:.3g} us"


def size(num_bytes: float) -> str:
    """Three digits, in powers of 1024: ``1.23 GiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def quantity(x: float) -> str:
    """Three digits, in powers of 1000: ``1.23 P``."""
    for power, unit in ((6, "E"), (5, "P"), (4, "T"), (3, "G"), (2, "M")):
        if x >= 1000**power:
            return f"{x / 1000**power:.2f} {unit}"
    return f"{x:,.0f}"
