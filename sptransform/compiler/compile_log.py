"""What a compile reports: one log line, and its graphs for ``tlparse``.

``TORCH_LOGS="+sptransform"`` shows the loggers of this package: at INFO one line per compile, at DEBUG the graph after
every pass. ``TORCH_TRACE=<folder>`` records the graphs before and after as artifacts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

# Private: structured traces have no public writer; tlparse shows every "artifact" by its name.
from torch._logging import trace_structured

from sptransform.engine.context import Context
from sptransform.engine.traffic import number_of_messages
from sptransform.graph.printer import text

log = logging.getLogger(__name__)


@contextmanager
def traced(graph: fx.Graph, context: Context) -> Iterator[None]:
    """Around the passes that rewrite ``graph`` in place: record it before and after, and log one line."""
    start = time.perf_counter()
    _artifact("sptransform_before", graph, is_local=False)
    yield
    _artifact("sptransform_after", graph, is_local=True)
    if log.isEnabledFor(logging.INFO):
        log.info("%s in %.2f s", summary(graph, context), time.perf_counter() - start)


def summary(graph: fx.Graph, context: Context) -> str:
    """``Ulysses(split='heads') on 4 ranks: 5 collectives forward, 6 backward, 0 fallbacks``."""
    forward, backward = number_of_messages(graph)
    return (
        f"{context.strategy} on {context.mesh.size} ranks: {forward} collectives forward, "
        f"{backward} backward, {len(context.result.fallbacks)} fallbacks"
    )


def _artifact(name: str, graph: fx.Graph, *, is_local: bool) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: text(graph.nodes, is_local=is_local),
    )
