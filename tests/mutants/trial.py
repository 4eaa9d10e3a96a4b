"""The tests against one mistake, each trial in a process and a copy of the checkout of its own.

Processes are forked from one that has imported the libraries, and nothing of this project: importing them is what takes
the time of a short trial.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.gloo_pool import PRELOAD
from tests.mutants.mutations import ROOT, Mutation
from tests.mutants.reach import Test

TIMEOUT = 180  # seconds of one test: a mistake can make it wait for ever, and its workers may have to start first
OURS = ("sptransform", "tests")
NONE_RAN = "<the tests did not run>"


class Trials:
    """Where trials run."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sptransform-mutants-"))
        for name in PRELOAD:
            if name.split(".")[0] not in OURS:
                importlib.import_module(name)

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def first_failure(self, mutation: Mutation, tests: Sequence[Test]) -> tuple[str, float]:
        """The first test that fails with the mistake, and fails again alone, or ""; and the seconds it took to tell."""
        start = time.monotonic()
        names = [test.name for test in tests]
        with self._copy(mutation) as copy:
            while names:
                failed = _failed(copy, names)
                if not failed or failed == NONE_RAN or _failed(copy, [failed]):
                    return failed, time.monotonic() - start
                names = names[names.index(failed) + 1 :]
        return "", time.monotonic() - start

    @contextmanager
    def _copy(self, mutation: Mutation) -> Iterator[Path]:
        """The files of the checkout, as they are but for the mistake."""
        copy = Path(tempfile.mkdtemp(dir=self._folder))
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in files.decode().split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
        (copy / mutation.path).write_text(mutation.apply((ROOT / mutation.path).read_text()))
        try:
            yield copy
        finally:
            shutil.rmtree(copy, ignore_errors=True)


def _failed(copy: Path, names: Sequence[str]) -> str:
    """Run these tests in the copy, until one fails: its name, or ""."""
    failed = copy / "failed"
    failed.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _run(copy, names)
    _, status = os.waitpid(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # workers that outlive their parent
    if failed.exists():
        return failed.read_text()
    return NONE_RAN if os.waitstatus_to_exitcode(status) else ""


def _run(copy: Path, names: Sequence[str]) -> None:
    """Be a process that runs these tests in the copy, and ends."""
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(copy)
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        # graphs compiled for one mistake are not another's
        os.environ |= {"PYTHONPATH": str(copy), "TORCHINDUCTOR_CACHE_DIR": str(copy / "cache")}
        files = sorted({name.split("::")[0] for name in names})
        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "--timeout", str(TIMEOUT)]
        code = int(pytest.main([*options, *files], plugins=[_Selection(names)]))
    finally:
        os._exit(code)


class _Selection:
    """Runs the named tests in their order, and writes down which one failed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._place = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((x for x in items if x.nodeid in self._place), key=lambda x: self._place[x.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            Path("failed").write_text(report.nodeid)
