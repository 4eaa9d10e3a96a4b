"""What each command does with what it was given."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sptransform.cli import calibrate as calibration
from sptransform.cli.doctor import Verdict, checked
from sptransform.cli.doctor import sections as found_by_doctor
from sptransform.cli.models import Asked, model_and_inputs, stepping
from sptransform.cost.hardware import hardware_of
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.inspection import pages
from sptransform.inspection.pages import Section
from sptransform.page import comparison
from sptransform.page import explain as explaining
from sptransform.page.explanation import Explanation
from sptransform.page.files import check_writable
from sptransform.page.render import write_page
from sptransform.planning.units import seconds
from sptransform.strategies.names import StrategyLike, strategy_of
from sptransform.testing.verify import verify as verified

Command = Callable[[argparse.Namespace], int]
Told = Callable[[str, int, int], None]


def explain(options: argparse.Namespace) -> int:
    """One report for each strategy; with several, one page has all of them."""
    _check_names(options.strategy, options.hardware)
    _check_files(options)
    found: list[Explanation] = []
    with _progress("making the model") as told:
        model, inputs = _made(options)
        for done, strategy in enumerate(options.strategy):
            told(_name(strategy), done, len(options.strategy))
            given = {"world_size": _shape(options), "hardware": options.hardware}
            found.append(explaining.explain(model, strategy, inputs, **given))
        if options.html is not None:
            told("writing the page", len(found), len(found))
            _write_html(found, options.html)
        for explanation, strategy in zip(found, options.strategy, strict=True):
            if options.trace is not None:
                explanation.trace(_one_of(options.trace, _name(strategy), len(found)))
        told("", len(found), len(found))
        times = [explanation.timeline for explanation in found]
    if options.json:
        return _print_json([_with_times(each) for each in found])
    for explanation, timeline in zip(found, times, strict=True):
        _show(explanation)
        if timeline is not None:
            step, exposed = seconds(timeline.seconds), seconds(timeline.exposed_seconds)
            sentence = f"One training step, simulated: {step}; {exposed} of it no computation hides."
            _show_sections([Section(f"Time on {timeline.hardware}", sentences=[sentence])])
    return 0


def _write_html(found: list[Explanation], path: str) -> None:
    first = found[0]
    if len(found) == 1:
        first.html(path)
        return
    hardware = None if first.hardware is None else first.hardware.name
    write_page(path, [each.option for each in found], title=f"{first.world_size} ranks", hardware=hardware)


def _with_times(explanation: Explanation) -> dict[str, Any]:
    data, timeline = explanation.to_dict(), explanation.timeline
    if timeline is not None:
        data |= {"seconds": timeline.seconds, "exposed_seconds": timeline.exposed_seconds}
    return data


def compare(options: argparse.Namespace) -> int:
    """The strategies side by side."""
    shape = options.world_size
    if len(shape) > 1:
        fix = "--world-size with one number: every mesh of so many ranks is tried"
        raise UsageError(describe("compare makes the meshes itself", found="x".join(map(str, shape)), fix=fix))
    _check_names(options.strategy or (), options.hardware)
    _check_files(options)
    with _progress("making the model") as told:
        model, inputs = _made(options)
        told("capturing", 0, 1)
        given = {"world_size": shape[0], "hardware": options.hardware, "strategies": options.strategy}
        found = comparison.compare(model, inputs, **given, progress=told)
        if options.html is not None:
            found.html(options.html)
        if options.trace is not None:
            found.trace(options.trace)
    if options.json:
        return _print_json(found.to_dict())
    _show(found)
    return 0


def verify(options: argparse.Namespace) -> int:
    """A verdict for each strategy; 1 if a model differs from one device."""
    _check_names(options.strategy)
    found = []
    with _progress("making the model") as told:
        model, inputs = model_and_inputs(
            Asked(options.model, options.seq_len, options.batch, on_meta=False, small=options.small)
        )
        for done, strategy in enumerate(options.strategy):
            told(_name(strategy), done, len(options.strategy))
            given = {"world_size": _shape(options), "processes": not options.simulated}
            found.append(stepping(options.model, partial(verified, model, strategy, inputs, **given)))
    if options.json:
        _print_json([verdict.to_dict() for verdict in found])
    else:
        for verdict in found:
            _show(verdict)
    return int(not all(verdict.ok for verdict in found))


def doctor(options: argparse.Namespace) -> int:
    """A verdict a line; 1 if one is a problem."""
    found = checked()
    if options.json:
        _print_json([asdict(each) for each in found])
    else:
        _show_sections(found_by_doctor(found))
    return int(any(each.verdict == Verdict.PROBLEM for each in found))


def calibrate(options: argparse.Namespace) -> int:
    """A hardware file of this machine."""
    check_writable(options.out, "--out")
    with _progress("starting processes") as told:
        hardware = calibration.calibrate(options.ranks, told)
    calibration.write(hardware, options.out)
    if options.json:
        return _print_json({name: list(constant) for name, constant in hardware.constants.items()})
    rows = [(name, _number(each.value), each.unit) for name, each in hardware.constants.items()]
    title = f"{hardware.what}, written to {options.out}"
    _show_sections([Section(title, ("constant", "value", "unit"), rows, numbers=frozenset({"value"}))])
    return 0


def _check_names(strategies: Sequence[StrategyLike], hardware: str | None = None) -> None:
    """Raise the errors of unknown names before a model is made, which may take long."""
    for strategy in strategies:
        strategy_of(strategy)
    if hardware is not None:
        hardware_of(hardware)


def _check_files(options: argparse.Namespace) -> None:
    """Raise the errors of what shall be written before a model is made."""
    if options.trace is not None and options.hardware is None:
        fix = "--hardware h100-nvlink"
        raise UsageError(describe("a trace has times, which hardware gives", found="no --hardware", fix=fix))
    for name in ("html", "trace"):
        if getattr(options, name) is not None:
            check_writable(getattr(options, name), f"--{name}")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _made(options: argparse.Namespace) -> tuple[Any, Any]:
    return model_and_inputs(Asked(options.model, options.seq_len, options.batch, options.dtype))


def _shape(options: argparse.Namespace) -> int | tuple[int, ...]:
    shape = options.world_size
    return shape[0] if len(shape) == 1 else shape


def _name(strategy: str | tuple[str, ...]) -> str:
    return strategy if isinstance(strategy, str) else "+".join(strategy)


def _one_of(path: str, name: str, several: int) -> Path:
    """The file of one strategy of several: ``step.json`` -> ``step.ring.json``."""
    file = Path(path)
    return file if several == 1 else file.with_suffix(f".{name}{file.suffix}")


def _show(report: Any) -> None:
    """Drawn on a terminal; plain text in a file or a pipe."""
    if sys.stdout.isatty():
        Console().print(report)
    else:
        sys.stdout.write(f"{report}\n\n")


def _show_sections(found: list[Section]) -> None:
    _show(pages.rich(found) if sys.stdout.isatty() else pages.plain(found))


def _print_json(data: Any) -> int:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")
    return 0


@contextmanager
def _progress(first: str) -> Iterator[Told]:
    """Progress on stderr, if that is a terminal. What a model prints goes there too: stdout is for the report."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with redirect_stdout(sys.stderr), progress:
        task = progress.add_task(first, total=None)
        yield lambda name, done, of: progress.update(task, description=name, completed=done, total=of)
