"""``python -m sptransform``: the command ``sptransform``."""

from __future__ import annotations

import sys

from sptransform.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
