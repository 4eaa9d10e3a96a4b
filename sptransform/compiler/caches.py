"""What cache keys need beyond the graph: the version of this package, the user's rules and passes, recompute tags."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx

from sptransform.compiler.custom import short_hash
from sptransform.compiler.options import Options
from sptransform.diagnostics.sources import PACKAGE, sources


def recompute_tags(graph: fx.Graph) -> str:
    """Hash of the recompute tags; "" if there are none. Compile caches see the ops of a graph, but not these tags."""
    regions: dict[Any, int] = {}  # region ids depend on the process, their order only on the model
    tags = [
        (index, node.meta["recompute"].value, regions.setdefault(node.meta.get("ac_graph_id"), len(regions)))
        for index, node in enumerate(graph.nodes)
        if "recompute" in node.meta
    ]
    return f"-{short_hash(repr(tags))}" if tags else ""


def custom_code(options: Options) -> str:
    """Hash of the user's rules and passes; "" if there are none."""
    return f"-{short_hash(repr(options.custom))}" if options.rules or options.passes else ""


@cache
def package_version(package: Path = PACKAGE) -> str:
    """Hash of the package's files: compile caches must not serve what another version compiled."""
    digest = hashlib.sha256()
    for file in sources(package):
        digest.update(f"{file.relative_to(package)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
