"""Whether a file can be written, said before the work whose result it shall hold."""

from __future__ import annotations

import os
from pathlib import Path

from sptransform.diagnostics.errors import UsageError, describe


def check_writable(path: str | Path, argument: str = "path") -> None:
    """Raise UsageError if no file can be written at ``path``, which the user gave as ``argument``."""
    file = Path(path)
    folder = file.parent
    if file.is_dir():
        found = "it is a folder"
    elif not folder.is_dir():
        found = f"no folder {folder}"
    elif not os.access(file if file.exists() else folder, os.W_OK):
        found = "it may not be written"
    else:
        return
    fix = f"{argument} with the path of a file, in a folder that is there"
    raise UsageError(describe(f"{path} cannot be written", found=found, fix=fix))
