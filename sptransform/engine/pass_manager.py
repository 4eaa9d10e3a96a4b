"""Passes over a graph, the invariants they require and ensure, and the manager that checks these."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import ClassVar

from torch import fx

from sptransform.diagnostics.errors import SPTransformError, VerificationError, shown
from sptransform.engine import verifier
from sptransform.engine.context import Context
from sptransform.graph.printer import text
from sptransform.sharding.sizes import needs_number

log = logging.getLogger(__name__)


class Pass:
    """Base of passes. Ours are frozen dataclasses, whose fields are their options.

    ``requires`` and ``ensures`` name invariants of :mod:`sptransform.engine.verifier`. What a pass requires must have
    been ensured before it. After it, its ``ensures`` and all earlier invariants that still hold are checked.

    Attributes:
        requires: invariants of the graph that the pass reads.
        ensures: invariants that hold after it.
        breaks: invariants that hold before it and may not hold after it.
        after: of a user's pass, the place in the pipeline: the name of a pass, after which it runs; of a phase
            ("normalize", "distribute", "finish"), at whose end it runs; or "capture", to run first.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[str] = "normalize"

    @property
    def name(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        return shown(self)

    def run(self, graph: fx.Graph, context: Context) -> None:
        """Rewrite ``graph`` in place."""
        raise NotImplementedError


# invariants that hold before the first pass, and once all mesh dims are done
CAPTURED = frozenset({"functional"})
DISTRIBUTED = frozenset({"functional", "local", "lowered"})


def _run_users(step: Pass, graph: fx.Graph, context: Context) -> None:
    """Run a user's pass; its errors become a VerificationError, and what it changed is computed again."""
    before = {node: (node.target, node.args, dict(node.kwargs)) for node in graph.nodes}
    try:
        returned = step.run(graph, context)
    except Exception as error:
        if isinstance(error, SPTransformError) or needs_number(error):
            raise
        raise VerificationError(f"the pass raised {type(error).__name__}: {error}") from error
    if returned is not None:
        found = type(returned).__name__
        raise VerificationError(f"a pass rewrites the graph in place and returns nothing, not a {found}")
    verifier.check_well_formed(graph)
    verifier.check_changed(graph, before)


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], context: Context, holds: frozenset[str] = CAPTURED
) -> fx.GraphModule:
    """Run ``passes`` in order on ``gm`` in place and return it; ``holds`` are the invariants that already hold.

    Raises:
        VerificationError: a pass lacks what it requires, or leaves a graph that breaks an invariant.
    """
    verifier.check_functional(gm.graph, context)
    ran = ["capture"]
    for step in passes:
        missing = step.requires - holds
        if missing:
            raise VerificationError(f"{step.name} requires {', '.join(sorted(missing))}; ran: {', '.join(ran)}")
        start = time.perf_counter()
        ran.append(step.name)
        holds = (holds - step.breaks) | step.ensures
        try:
            if type(step).__module__.split(".")[0] == "sptransform":
                step.run(gm.graph, context)
                verifier.check_well_formed(gm.graph)
            else:
                _run_users(step, gm.graph, context)
            for invariant in sorted(holds):
                verifier.INVARIANTS[invariant](gm.graph, context)
        except VerificationError as error:
            raise VerificationError(f"after {' > '.join(ran)}:\n{error}") from error
        log.debug("%s took %.3f s", step.name, time.perf_counter() - start)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s:\n%s", step.name, text(gm.graph.nodes))
    gm.recompile()
    return gm
