"""Is the installed torch one that this package was tested with?"""

from __future__ import annotations

import warnings
from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.diagnostics.private_api import missing


def check_torch_version() -> None:
    """Compare the installed torch with what this package's metadata says. A newer one is a warning.

    Raises:
        UsageError: it is older than the oldest that is supported, or one that is left out.
    """
    try:
        requirements = metadata.requires("sptransform") or []
    except metadata.PackageNotFoundError:  # a source tree on the path
        return
    required = next((each for each in map(Requirement, requirements) if each.name == "torch"), None)
    if required is None:
        return
    # builds before a release count as the release
    version = Version(torch.__version__).base_version
    broken = {each.operator for each in required.specifier if not each.contains(version)}
    if broken - {"<"}:
        raise UsageError(
            describe(
                "this version of torch is not supported",
                found=f"torch {torch.__version__}",
                fix=f"pip install '{required}'",
            )
        )
    if broken:
        warnings.warn(_untested(str(required)), stacklevel=3)


def _untested(required: str) -> str:
    lost = [f"{name} ({', '.join(files)})" for name, files in missing().items()]
    if lost:
        found = f"torch {torch.__version__}, which does not have\n         " + "\n         ".join(lost)
    else:
        found = f"torch {torch.__version__}; all private names of torch that are used are there"
    return describe(
        "this version of torch is newer than those that sptransform was tested with",
        found=found,
        fix=f"pip install '{required}', or a newer sptransform; or go on, and compare with one device first",
    )
