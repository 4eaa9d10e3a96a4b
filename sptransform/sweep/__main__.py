"""The command: ``python -m sptransform.sweep [--family F] [--only NAME] [--strategies ..] [--ranks ..] [--jobs N]``.

Results are kept in a file of JSON lines, by architecture, strategy, ranks and versions of packages; what is there is
not done again, so a sweep that was stopped goes on. At its end the page of all results is written.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.strategies.names import strategy_of
from sptransform.sweep.page import page
from sptransform.sweep.records import Status, append, read
from sptransform.sweep.registries import DIFFUSION, FAMILIES, Architecture, architectures, is_installed
from sptransform.sweep.running import Limits, pending, run
from sptransform.testing.pretended import Asked


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m sptransform.sweep", description="Every architecture against one device."
    )
    parser.add_argument(
        "--family", action="append", choices=FAMILIES, help="only these; default: all that are installed"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="only the classes of these names")
    parser.add_argument("--strategies", nargs="+", default=["ulysses", "ring", "megatron"], metavar="STRATEGY")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3], metavar="N")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    parser.add_argument(
        "--time-limit", type=int, default=240, help="seconds of processor time for one architecture (240)"
    )
    parser.add_argument(
        "--memory-limit", type=float, default=16.0, help="GiB of address space for one architecture (16)"
    )
    parser.add_argument("--again", nargs="*", default=[], choices=[status.name.lower() for status in Status],
                        help="do results of these kinds again")  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path(".sweep/results.jsonl"), help="the file of results")
    parser.add_argument("--page", type=Path, default=Path("docs/supported_models.md"), help="the page to write")
    return parser.parse_args(given)


def chosen(options: argparse.Namespace) -> list[Architecture]:
    """Raises UsageError for a name that is no architecture."""
    families = tuple(options.family or (f for f in FAMILIES if f != DIFFUSION or is_installed("diffusers")))
    found = architectures(families)
    unknown = set(options.only or ()) - {each.name for each in found}
    if unknown:
        raise UsageError(
            describe("no such architecture", found=", ".join(sorted(unknown)), fix="a class of the registries")
        )
    return [each for each in found if options.only is None or each.name in options.only]


def main(given: Sequence[str]) -> int:
    options = arguments(given)
    asked = [Asked(n, each) for each in options.strategies for n in options.ranks]
    for name in options.strategies:
        strategy_of(name)  # raises for one that does not exist
    again = frozenset(Status[name.upper()] for name in options.again)
    todo = pending(chosen(options), asked, read(options.results), again)
    console = Console(stderr=True)
    limits = Limits(options.time_limit, int(options.memory_limit * 2**30))
    statuses: Counter[str] = Counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(todo))
        options.results.parent.mkdir(parents=True, exist_ok=True)
        for architecture, record in run(todo, options.jobs, limits, options.results.with_suffix(".log")):
            if record is None:
                progress.advance(task)
                continue
            append(options.results, [record])
            statuses[record.status.value] += 1
            counts = ", ".join(f"{number} {status}" for status, number in statuses.most_common())
            progress.update(task, description=f"{architecture.name}: {counts}")
    records = read(options.results)
    options.page.write_text(page(records, [each.name for each in architectures()]))
    return int(any(record.status in (Status.WRONG, Status.CRASHED) for record in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
