"""See the package. Mistakes are drawn by `--seed`, as many of one kind as of another."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.table import Table

from tests.mutants.mutations import KINDS, ROOT, Mutation, draw, source_files
from tests.mutants.reach import Reach, Test, digest
from tests.mutants.trial import Trials
from tests.support.gloo_pool import REACH

KEPT = ROOT / ".mutants"
T = TypeVar("T")
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
    folder = KEPT / digest([*source_files(), *Path(__file__).parent.glob("*.py")])
    state = digest(file for file in (ROOT / "tests").rglob("*") if file.suffix in (".py", ".txt"))
    _record(folder / "reach", state, asked.whole)
    reach = Reach(folder / "reach")
    console = Console(emoji=False)  # `file:100:` is a place
    results = folder / "outcomes.jsonl"
    known = _known(results)
    drawn = {_named(mutation): mutation for mutation in draw(asked.num, asked.seed)}
    open_ones = [names for names in drawn if _is_open(known.get(names), state, asked.whole)]
    with Trials() as trials, results.open("a") as kept:

        def try_out(names: Names) -> str:
            before = known.get(names)
            mutation = drawn[names]
            tests = reach.tests_at(mutation.path, mutation.line)
            # a test that saw it before comes first
            tests.sort(key=lambda test: before is None or test.name != before.by)
            return json.dumps(asdict(_outcome(trials, mutation, names, tests, state, asked.whole)))

        for line in in_processes(try_out, open_ones, asked.jobs):
            outcome = Outcome(**json.loads(line))
            known[outcome.names] = outcome
            kept.write(line + "\n")
            kept.flush()
            at = f"{outcome.path}:{outcome.line} {outcome.kind}"
            console.print(f"{outcome.verdict:8} {at}, {outcome.seconds:.0f} s  {outcome.by}", markup=False)
    return _report(console, [known[names] for names in drawn])


Names = tuple[str, int, str, str, str]


def _named(mutation: Mutation) -> Names:
    return mutation.path, mutation.line, mutation.kind, *mutation.shown((ROOT / mutation.path).read_text())


def _is_open(found: Outcome | None, state: str, whole: bool) -> bool:
    """What other tests told is asked again, and slow ones where they were not."""
    survived = found is not None and found.verdict == "survived"
    return found is None or found.tests != state or (survived and whole and not found.whole)


def _outcome(
    trials: Trials, mutation: Mutation, names: Names, tests: list[Test], state: str, whole: bool
) -> Outcome:
    """Run the tests that reach a mutation: those of the quick tier, and where none fails the others."""
    verdict, by, seconds = "survived", "", 0.0
    for tier in ("quick", "slow") if whole else ("quick",):
        asked = [test.name for test in tests if test.is_slow == (tier == "slow")]
        by, took = trials.first_failure(mutation, asked)
        seconds += took
        if by:
            verdict = tier
            break
    return Outcome(*names, verdict, by, len(tests), round(seconds, 1), state, whole)


def in_processes(call: Callable[[T], str], arguments: Sequence[T], jobs: int) -> Iterator[str]:
    """`call` of each, in processes forked from this one, as they end. They end with this one."""
    waiting, running = list(reversed(arguments)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                argument = waiting.pop()
                read, write = os.pipe()
                pid = os.fork()
                if pid == 0:
                    _answer(lambda argument=argument: call(argument), write)
                os.close(write)
                running[pid] = read
            pid, status = os.wait()
            with os.fdopen(running.pop(pid)) as answer:
                text = answer.read()
            if os.waitstatus_to_exitcode(status):
                raise RuntimeError(f"a trial failed:\n{text}")
            yield text
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def _answer(call: Callable[[], str], write: int) -> NoReturn:
    """Be a process that writes what the call gives, an answer of less than a pipe holds, and ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and says when to end
    code = 1
    try:
        os.write(write, call().encode())
        code = 0
    except BaseException as error:
        os.write(write, repr(error).encode())
    finally:
        os._exit(code)


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
    # the other tracers of coverage know no contexts
    environment = os.environ | {REACH: str(folder), "COVERAGE_CORE": "ctrace"}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
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
