"""See the package. The mistakes of a run are drawn by `--seed`, as many of each kind as there are."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.mutants.mutations import KINDS, ROOT, Mutation, draw, source_files
from tests.mutants.reach import Reach, Test, digest
from tests.mutants.recorder import FOLDER
from tests.mutants.trial import Trials

KEPT = ROOT / ".mutants"
NO_FAULT = Path(__file__).with_name("no_fault.json")


@dataclass(frozen=True)
class Outcome:
    """`verdict`: seen by the quick tier, by slow tests only, or survived; `by` is the test that failed.

    `tests` is the state of the tests, `whole` whether slow ones were asked.
    """

    path: str
    line: int
    kind: str
    before: str
    after: str
    verdict: str
    by: str
    num_tests: int
    seconds: float
    tests: str
    whole: bool

    @property
    def names(self) -> Names:
        return self.path, self.line, self.kind, self.before, self.after


def main() -> int:
    asked = _arguments()
    folder = KEPT / digest(source_files())
    tests = digest(sorted((ROOT / "tests").rglob("*.py")))
    _record(folder / "reach", tests, asked.whole)
    console = Console()
    results = folder / "outcomes.jsonl"
    known = _known(results)
    drawn = draw(asked.num, asked.seed)
    open_ones = [mutation for mutation in drawn if _is_open(known.get(_named(mutation)), tests, asked.whole)]
    reach = Reach(folder / "reach")
    tasks = [(mutation, reach.tests_at(mutation.path, mutation.line)) for mutation in open_ones]
    # processes, which fork trials in their turn: a fork beside threads would not be safe
    with (
        Trials() as trials,
        ProcessPoolExecutor(asked.jobs, mp_context=get_context("fork")) as pool,
        results.open("a") as kept,
    ):
        for done in as_completed([pool.submit(try_out, trials, tests, asked.whole, *task) for task in tasks]):
            outcome = done.result()
            known[outcome.names] = outcome
            kept.write(json.dumps(asdict(outcome)) + "\n")
            kept.flush()
            at = f"{outcome.path}:{outcome.line} {outcome.kind}"
            console.print(f"{outcome.verdict:8} {at}, {outcome.seconds:.0f} s  {outcome.by}", markup=False)
    return _report(console, [known[_named(mutation)] for mutation in drawn])


Names = tuple[str, int, str, str, str]


def _named(mutation: Mutation) -> Names:
    return mutation.path, mutation.line, mutation.kind, *mutation.shown((ROOT / mutation.path).read_text())


def _is_open(found: Outcome | None, tests: str, whole: bool) -> bool:
    """What survived meets tests that have changed since, and slow ones where they were not asked."""
    survived = found is not None and found.verdict == "survived"
    return found is None or (survived and (found.tests != tests or (whole and not found.whole)))


def try_out(trials: Trials, state: str, whole: bool, mutation: Mutation, tests: list[Test]) -> Outcome:
    """Run the tests that reach a mutation: those of the quick tier, and where none fails the others."""
    verdict, by, seconds = "survived", "", 0.0
    for tier in ("quick", "slow") if whole else ("quick",):
        by, took = trials.first_failure(mutation, [test for test in tests if test.is_slow == (tier == "slow")])
        seconds += took
        if by:
            verdict = tier
            break
    return Outcome(*_named(mutation), verdict, by, len(tests), round(seconds, 1), state, whole)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutants ARGS=..", description="How many small mistakes the tests see.")
    parser.add_argument("--num", type=int, default=120, help="how many mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time")
    parser.add_argument("--whole", action="store_true", help="what the quick tier misses meets the slow tests too")
    return parser.parse_args()


def _record(folder: Path, state: str, whole: bool) -> None:
    """Run the tests once, and note what they reach; of the quick tier where no more is asked for."""
    done = folder / ("whole" if whole else "quick")
    if any(file.exists() and file.read_text() == state for file in (done, folder / "whole")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    options = ["-o", "addopts=--strict-markers"] if whole else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.mutants.recorder", *options]
    if subprocess.run(command, cwd=ROOT, env=os.environ | {FOLDER: str(folder)}, check=False).returncode:
        raise SystemExit("the tests fail as they are: what they reach was not recorded")
    done.write_text(state)


def _known(results: Path) -> dict[Names, Outcome]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {outcome.names: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}


def _report(console: Console, outcomes: list[Outcome]) -> int:
    """A row for each kind, and every survivor with what is known of it; 1 if of one nothing is known."""
    entries = json.loads(NO_FAULT.read_text())
    reasons = {(entry["path"], entry["before"], entry["after"]): entry["why"] for entry in entries}
    why = {x: reasons.get((x.path, x.before, x.after)) for x in outcomes if x.verdict == "survived"}
    table = Table("kind", "mistakes", "seen by the quick tier", "by slow tests only", "no fault", "survived")
    for kind in [*KINDS, "all"]:
        own = [x for x in outcomes if kind in (x.kind, "all")]
        verdicts = Counter("no fault" if why.get(x) else x.verdict for x in own)
        table.add_row(kind, str(len(own)), *(str(verdicts[x]) for x in ("quick", "slow", "no fault", "survived")))
    console.print(table)
    for outcome, reason in why.items():
        console.print(f"\n{outcome.path}:{outcome.line}: {outcome.kind}, {outcome.num_tests} tests", markup=False)
        console.print(f"  - {outcome.before}\n  + {outcome.after}\n  {reason or 'survived'}", markup=False)
    return 1 if None in why.values() else 0


if __name__ == "__main__":
    sys.exit(main())
