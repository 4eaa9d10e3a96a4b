"""Where the processor time of the tests goes, by kind of work and by file.

    make times                      the quick tier
    make times ARGS="tests/passes"  any arguments of pytest

py-spy looks at every process of the run 20 times a second. A sample counts for the innermost frame that says what kind
of work it is, and for the test file whose frame is outermost. Only Python is seen, not the C++ compiler that Inductor
starts. A process that waits for a processor counts as one that works: run it on an idle machine.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

RATE = 20  # samples a second
# The first line that fits a frame tells its kind; frames are `function (file:line)`.
KINDS: list[tuple[str, str]] = [
    ("garbage collection", r"^(_reset|collect_seldom) \(tests/support/gloo_pool"),
    ("imports", r"<frozen importlib"),
    ("processes", r"multiprocessing/|subprocess\.py"),
    ("our retrace", r"sptransform/capture/"),
    ("verifier", r"sptransform/engine/verifier"),
    ("passes", r"sptransform/|\(passes/"),
    ("Inductor", r"torch/_inductor/"),
    ("running", r"_aot_autograd/runtime_wrappers|tests/support/lockstep"),
    ("AOT", r"torch/_functorch/"),
    ("Dynamo", r"torch/_dynamo/(?!eval_frame|utils|external_utils|decorators)"),
    ("models", r"transformers/|\(tests/support/(models|tiny|shapes)"),
    ("running", r"\(tests/"),
    ("pytest", r"_pytest/|pluggy/"),
]
OWN_OPS = re.compile(r"sptransform/(ops|agreement)/")


def kind_of(stack: list[str]) -> str:
    """Of frames `function (file:line)`, outermost first."""
    for frame in reversed(stack):
        if OWN_OPS.search(frame):
            continue  # runs in every kind of work
        for kind, pattern in KINDS:
            if re.search(pattern, frame):
                return kind
    return "running"


def file_of(stack: list[str]) -> str:
    for frame in stack:
        if frame.startswith("process "):
            continue  # its command line
        found = re.search(r"tests/(\S*test_\w+\.py)", frame)
        if found is not None:
            return found[1]
    return "(between tests, and processes that start)"


def table(title: str, samples: Counter[str], console: Console) -> None:
    total = samples.total()
    shown = Table(title, "seconds", "share")
    for name, count in samples.most_common():
        shown.add_row(name, f"{count / RATE:.1f}", f"{count / total:.1%}")
    shown.add_row("all", f"{total / RATE:.1f}", "")
    console.print(shown)


def read(lines: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """Samples by kind and by file, of py-spy's raw format: `frame;frame;frame count`."""
    kinds: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        if not count.isdecimal():
            continue  # the rest of a process name with line breaks
        frames = stack.split(";")
        kinds[kind_of(frames)] += int(count)
        files[file_of(frames)] += int(count)
    return kinds, files


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        program = Path(sys.executable).with_name("py-spy")
        spy = [str(program), "record", "--rate", str(RATE), "--subprocesses", "--nonblocking", "--format", "raw"]
        start = time.monotonic()
        # py-spy does not pass on how its program ended
        ended = Path(folder, "ended")
        tests = shlex.join([sys.executable, "-m", "pytest", "-q", *sys.argv[1:]])
        command = [*spy, "--output", str(raw), "--", "sh", "-c", f"{tests}; echo $? > {ended}"]
        subprocess.run(command, check=False)
        wall = time.monotonic() - start
        if not ended.exists():
            return 1  # py-spy said why
        kinds, files = read(raw.read_text().splitlines())
        code = int(ended.read_text())
    console = Console()
    table("kind of work", kinds, console)
    table("test file", files, console)
    console.print(f"{wall:.0f} s of wall time")
    return code


if __name__ == "__main__":
    sys.exit(main())
