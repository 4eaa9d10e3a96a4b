"""What a compile reports: one log line, and its graphs and its messages for ``tlparse``.

``TORCH_LOGS="+sptransform"`` shows the loggers of this package: at INFO one line per compile, at DEBUG the graph after
every pass. ``TORCH_TRACE=<folder>`` records the graphs before and after as artifacts, and what is sent where.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import fx

# Private: structured traces have no public writer; tlparse shows every "artifact" by its name.
from torch._logging import trace_structured

from sptransform.engine.context import Context
from sptransform.engine.traffic import count_collectives, number_of_messages
from sptransform.graph import dataflow
from sptransform.graph.printer import text

log = logging.getLogger(__name__)


@contextmanager
def traced(graph: fx.Graph, context: Context) -> Iterator[None]:
    """Around the passes that rewrite ``graph`` in place: record it before and after, and log one line."""
    start = time.perf_counter()
    _artifact("sptransform_before", lambda: text(graph.nodes))
    yield
    _artifact("sptransform_after", lambda: text(graph.nodes, is_local=True))
    _artifact("sptransform_summary", lambda: "\n".join([summary(graph, context), *_sent(graph, context)]))
    if log.isEnabledFor(logging.INFO):
        log.info("%s in %.2f s", summary(graph, context), time.perf_counter() - start)


def summary(graph: fx.Graph, context: Context) -> str:
    """``Ulysses(split='heads') on 4 ranks: 5 collectives forward, 6 backward, 0 fallbacks``."""
    forward, backward = number_of_messages(graph)
    return (
        f"{context.strategy} on {context.mesh.size} ranks: {forward} collectives forward, "
        f"{backward} backward, {len(context.result.fallbacks)} fallbacks"
    )


def _sent(graph: fx.Graph, context: Context) -> Iterator[str]:
    """One line for each module, direction and kind of collective; with bytes where all lengths are known."""
    if any(not isinstance(size, int) for node in graph.nodes for shape in dataflow.shapes(node) for size in shape):
        return
    count: Counter[tuple[str, str, str]] = Counter()
    sent: Counter[tuple[str, str, str]] = Counter()
    for collective in count_collectives(graph, context.mesh):
        place = collective.layer or "(model)", collective.direction, collective.kind
        count[place] += collective.count
        sent[place] += collective.bytes_sent
    for place, number in count.items():
        yield f"{' '.join(place)}: {number} messages, {sent[place]:,} bytes sent by rank {context.mesh.rank}"


def _artifact(name: str, payload: Callable[[], str]) -> None:
    """What ``payload`` returns, which is called only if a trace is written."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)
