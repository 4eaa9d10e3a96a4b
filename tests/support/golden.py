"""Golden texts: what a graph or a message looks like, kept in `tests/golden/`, a file for each.

`pytest --update-golden` writes the files anew; the diff of a commit then shows what changed. Texts tell what a pass
makes of a graph; that it means the same is another test's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import sptransform

FOLDER = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    """Compares texts with files, or writes the files."""

    update: bool

    def check(self, name: str, **parts: str) -> None:
        """`parts` are titled sections of the golden file called `name`."""
        found = "\n".join(f"## {title}\n{_without_folders(text).rstrip()}\n" for title, text in parts.items())
        file = FOLDER / f"{name}.txt"
        if self.update:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(found)
            return
        assert file.exists(), f"no golden file {file.name}: run pytest --update-golden, and read what it wrote"
        assert found == file.read_text(), f"{file.name} has changed: if that is meant, run pytest --update-golden"


def _without_folders(text: str) -> str:
    """Paths of this checkout, and line numbers in the tests, do not belong in a golden text."""
    root = str(Path(sptransform.__file__).parent.parent)
    return re.sub(r"(tests/\S+\.py):\d+", r"\1:N", text.replace(f"{root}/", ""))
