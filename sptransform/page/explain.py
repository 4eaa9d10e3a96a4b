"""``explain``: what the compiler would insert into a model, where and at what cost. Needs no processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from sptransform.compiler.rewrite import rewrite
from sptransform.cost.hardware import HardwareLike, hardware_of
from sptransform.engine.pass_manager import DISTRIBUTED, run_passes
from sptransform.inspection.attended_work import checked_documents
from sptransform.inspection.ring_steps import expanded_rings
from sptransform.page.explanation import Explanation, explanation_of
from sptransform.passes.inspect.expand_rings import ExpandRings
from sptransform.strategies.names import StrategyLike


def explain(
    model: nn.Module,
    strategy: StrategyLike,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    world_size: int | tuple[int, ...],
    rank: int = 0,
    expand: bool = False,
    documents: Sequence[int] | Sequence[Sequence[int]] | None = None,
    hardware: HardwareLike | None = None,
    **options: Any,
) -> Explanation:
    """Return what ``rank`` of ``world_size`` would run and send in one training step, without processes or devices.

    ``print`` it, ``rich.print`` it, take ``to_dict()``, or write ``html(path)`` and ``trace(path)``. The model is not
    run or changed; model and inputs may live on the ``meta`` device, where they take no memory.

    Args:
        model: the unmodified module.
        strategy: as for :func:`sptransform.frontend.parallelize`.
        inputs: keyword arguments (a mapping) or positional ones (a tuple) of the model's forward.
        world_size: number of ranks, or a tuple with the size of each mesh dim.
        rank: the rank to explain; bytes differ only if something does not divide by the number of ranks.
        expand: show the steps of rings, hop by hop: in the page, as ``expanded``, and as nodes of ``graph()``.
        documents: the lengths of packed documents, for all rows alike or one list for each: the work of every rank is
            then counted in pairs of a query and a key of one document, whether or not the masks of these inputs keep
            documents apart. What is left of a row is padding.
        hardware: the name of a known machine such as "h100-nvlink", the path of a file with another, or a
            :class:`~sptransform.cost.hardware.Hardware`: times are then simulated, for the page and the trace.
        options: further options of :func:`sptransform.frontend.parallelize`.

    Raises:
        UsageError: an argument is wrong.
    """
    lengths = checked_documents(documents)
    machine = None if hardware is None else hardware_of(hardware)
    rewritten = rewrite(model, strategy, inputs, world_size=world_size, rank=rank, **options)
    explanation = explanation_of(rewritten, lengths, machine)
    return expanded(explanation) if expand else explanation


def expanded(explanation: Explanation) -> Explanation:
    """The explanation with the steps of its rings, and their nodes in a copy of the graph."""
    whole = explanation.rewritten
    gm = fx.GraphModule(whole.graph_module, copy.deepcopy(whole.graph_module.graph))
    gm.meta = dict(whole.graph_module.meta)
    run_passes(gm, [ExpandRings()], whole.context, DISTRIBUTED)
    shown = replace(whole, graph_module=gm)
    return replace(explanation, rewritten=shown, whole=whole, expanded=expanded_rings(whole))
