"""The package's own files."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def sources(package: Path = PACKAGE) -> list[Path]:
    """Every Python file of the package. ``passes`` is a link in a checkout, which ``Path.rglob`` does not follow."""
    folders = os.walk(package, followlinks=True)
    return sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py"))
