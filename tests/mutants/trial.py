"""The tests against one mistake, each trial in a process and a copy of the checkout of its own.

Processes are forked from one that has imported the libraries, and nothing of this project: importing them is what takes
the time of a short trial.
"""

from __future__ import annotations

import faulthandler
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

from tests.mutants.mutations import ROOT, Mutation
from tests.support.gloo_pool import PRELOAD

TEST_LIMIT = 180  # seconds of one test: a mistake can make it wait for ever, and its workers may have to start first
LIMIT = 3600  # seconds of all tests of a trial
OURS = ("sptransform", "tests")
NONE_RAN = "<the tests did not run>"


class Trials:
    """Where trials run: from the checkout as it was when they began, files that git does not know yet included."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sptransform-mutants-"))
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")[:-1]
        for name in files:
            if os.path.lexists(ROOT / name):
                (self._folder / "as it is" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self._folder / "as it is" / name, follow_symlinks=False)
        for name in PRELOAD:
            if name.split(".")[0] not in OURS:
                importlib.import_module(name)

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def first_failure(self, mutation: Mutation, names: Sequence[str]) -> tuple[str, float]:
        """The first test that fails with the mistake, and fails again alone, or ""; and the seconds it took to tell."""
        start = time.monotonic()
        with self._copy(mutation) as copy:
            while names:
                failed = _failed(copy, names)
                if not failed or _failed(copy, names if failed == NONE_RAN else [failed]):
                    return failed, time.monotonic() - start
                names = [] if failed == NONE_RAN else names[names.index(failed) + 1 :]
        return "", time.monotonic() - start

    @contextmanager
    def _copy(self, mutation: Mutation) -> Iterator[Path]:
        copy = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            shutil.copytree(self._folder / "as it is", copy, symlinks=True, dirs_exist_ok=True)
            file = copy / mutation.path
            file.write_text(mutation.apply(file.read_text()))
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
    with suppress(OSError):  # the child does so too; whoever comes first
        os.setpgid(pid, pid)
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # workers outlive their parent
    if failed.exists():
        return failed.read_text()
    code = os.waitstatus_to_exitcode(status)
    return "" if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else NONE_RAN


def _run(copy: Path, names: Sequence[str]) -> None:
    """Be a process that runs these tests in the copy, and ends."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        os.chdir(copy)
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        # graphs compiled for one mistake are not another's
        os.environ |= {"PYTHONPATH": str(copy), "TORCHINDUCTOR_CACHE_DIR": str(copy / "cache")}
        files = sorted({name.split("::")[0] for name in names if (copy / name.split("::")[0]).exists()})
        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "--basetemp", "temporary"]
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
        for item in items:
            item.add_marker(pytest.mark.timeout(TEST_LIMIT), append=False)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            Path("failed").write_text(report.nodeid)
