"""Records which test runs which lines, and how long it takes: `pytest -p tests.mutants.recorder`.

Lines that run in gloo workers count for the test that called them. Not recorded is what runs in other processes that a
test starts itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import coverage
import pytest

from tests.mutants.mutations import ROOT, SOURCES
from tests.support.gloo_pool import REACH


class Recorder:
    """Records the lines that this process runs, by test, in a file of its own."""

    def __init__(self) -> None:
        folder = os.environ[REACH]
        self._coverage = coverage.Coverage(
            data_file=f"{folder}/lines.{os.getpid()}",
            config_file=False,
            source=[str(ROOT / name) for name in SOURCES],
            messages=False,
        )
        self._coverage.start()

    @contextmanager
    def during(self, test: str) -> Iterator[None]:
        """What runs inside runs for this test."""
        self._coverage.switch_context(test)
        try:
            yield
        finally:
            self._coverage.switch_context("")
            self._coverage.save()


class Plugin:
    """What pytest tells of."""

    def __init__(self) -> None:
        self._recorder = Recorder()
        self._costs = Path(os.environ[REACH], "costs.jsonl")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start = time.monotonic()
        with self._recorder.during(item.nodeid):
            yield
        is_slow = item.get_closest_marker("slow") is not None
        with self._costs.open("a") as costs:
            costs.write(json.dumps([item.nodeid, round(time.monotonic() - start, 4), is_slow]) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin())
