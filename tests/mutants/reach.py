"""Which tests reach a line, and how long a test takes: the record that `recorder.py` made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import coverage

from tests.mutants.mutations import ROOT


def digest(files: Iterable[Path]) -> str:
    together = hashlib.sha256()
    for file in files:
        together.update(file.read_bytes())
    return together.hexdigest()[:16]


@dataclass(frozen=True)
class Test:
    name: str
    seconds: float
    is_slow: bool


class Reach:
    """The record in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def tests(self) -> dict[str, Test]:
        lines = (self._folder / "costs.jsonl").read_text().splitlines()
        return {test.name: test for test in (Test(*json.loads(line)) for line in lines)}

    @cached_property
    def _data(self) -> coverage.CoverageData:
        """The files of all processes as one."""
        together = coverage.CoverageData(no_disk=True)
        for file in sorted(self._folder.glob("lines.*")):
            part = coverage.CoverageData(basename=str(file))
            part.read()
            together.update(part)
        return together

    @cached_property
    def _unknown(self) -> set[str]:
        """Tests of which nothing is recorded: their work is done in processes of their own."""
        return self.tests.keys() - self._data.measured_contexts()

    def tests_at(self, path: str, line: int) -> list[Test]:
        """The tests that run a line, cheap ones first; then those of their files, which may share what these computed.

        What runs on import may matter to every test that runs something of its file.
        """
        contexts = self._data.contexts_by_lineno(str((ROOT / path).resolve()))
        names = {name for name in contexts.get(line, ()) if name}
        at_import = not names or "" in contexts.get(line, ())
        also = {name for found in contexts.values() for name in found if name} if at_import else names
        files = {name.split("::")[0] for name in also}
        beside = also | {name for name in self.tests if name.split("::")[0] in files} | self._unknown
        tests = [self.tests[name] for name in beside & self.tests.keys()]
        return sorted(tests, key=lambda test: (test.name not in names, test.seconds, test.name))
