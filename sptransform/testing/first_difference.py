"""Where ranks first differ from one device, in order of execution: found by what simulated ranks compute inside.

The captured graph is made to return what each module computes last, on one device and, rewritten, on ranks. Of the
first module that differs it then returns every tensor since the one before. So a mistake is placed at a module and a
line. If nothing differs in the forward, it is in the backward: gradients are compared in the order in which that comes
to them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from sptransform.diagnostics.errors import SPTransformError
from sptransform.diagnostics.provenance import module_path, source_line, without_folders
from sptransform.testing.capturing import copied
from sptransform.testing.equality import FLOOR, Difference, Result, differences, largest, relative_error
from sptransform.testing.pretended import Asked, Runnable
from sptransform.testing.rounding import TOLERANCE, TOLERANCE_IN_DOUBLE
from sptransform.testing.simulated import Captured, captured
from sptransform.testing.trial import OneDevice


def first_difference(
    reference: OneDevice,
    asked: Asked,
    options: Mapping[str, Any],
    bound: float,
    in_double: bool,
    found: Sequence[Difference],
    of_ranks: Callable[[Captured, Result], list[list[Difference]]],
) -> str:
    """In words, for a reader.

    Args:
        bound: what may differ.
        in_double: look at the graph in which everything is float64, where rounding hides nothing.
        found: how tensors differ.
        of_ranks: how simulated ranks differ from a result.
    """

    def use(given: Captured) -> str | None:
        own = given.step(given.on_one_device())
        names = {(each.kind, each.name) for each in found if each.kind != "buffer"}
        allowed = max(bound, TOLERANCE) if in_double else bound
        for each in differences(reference.first.result, own):
            if (each.kind, each.name) in names and not each.error <= allowed:
                what = f"{each.kind} {each.name}"
                return f"before anything is rewritten: what torch.compile captured gives another {what}"
        within = bound
        if in_double:
            given, within = given.in_double(), TOLERANCE_IN_DOUBLE
            own = given.step(given.on_one_device())
        if all(each.error <= within for rank in of_ranks(given, own) for each in rank):
            return "not on simulated ranks, so outside of the rewritten graph: in process groups, or the inner backend"
        return _in_forward(given, asked, options, within)

    try:
        place = captured(reference, use, options.get("outputs"))
    except SPTransformError as error:
        return f"not found, for what modules compute cannot be returned: {str(error).splitlines()[0]}"
    if place is not None:
        return place
    wrong = [each for each in found if not each.error <= bound]
    order = [*reference.first.result.grads, *reference.first.result.input_grads]
    gradients = [each for each in wrong if each.kind in ("parameter", "input") and each.name in order]
    if not gradients:
        return f"{wrong[0].kind} {wrong[0].name}: what modules compute before it does not differ"
    first = min(gradients, key=lambda each: order.index(each.name))
    what = "" if first.kind == "parameter" else "the input "
    return f"in the backward: no module's output differs. It comes to the gradient of {what}{first.name} first"


def _in_forward(given: Captured, asked: Asked, options: Mapping[str, Any], bound: float) -> str | None:
    tensors = [node for node in given.graph_module.graph.nodes if _is_float(node)]
    ends = _module_ends(tensors)
    last = _first_wrong(given, asked, options, bound, ends)
    if last is None:
        return None
    at = ends.index(last)
    since = tensors[tensors.index(ends[at - 1]) + 1 if at else 0 : tensors.index(last) + 1]
    node = _first_wrong(given, asked, options, bound, since) or last
    module = module_path(node).partition(".")[2] or "the model itself"
    line = source_line(node)
    return f"in {module}" + (f", at {without_folders(line)}" if line else f", {node.name}")


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return node.op.startswith("call_") and isinstance(value, Tensor) and value.is_floating_point()


def _module_ends(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The last of these nodes in each module, in order."""
    last = {module: node for node in nodes for module in node.meta.get("nn_module_stack") or {}}
    return sorted(set(last.values()), key=nodes.index)


def _first_wrong(
    given: Captured, asked: Asked, options: Mapping[str, Any], bound: float, nodes: Sequence[fx.Node]
) -> fx.Node | None:
    """The first of these nodes whose value differs on a rank."""
    returning = _returning(given, [node.name for node in nodes])

    def values(graph: Runnable) -> list[Tensor]:
        return [x.detach() for x in graph.call(*copied(graph.inputs))[-len(nodes) :]]

    expected = values(returning.on_one_device())
    ranks = returning.on_ranks(asked, options).run(values)
    floor = FLOOR * max(map(largest, expected))
    for node, own, *of_ranks in zip(nodes, expected, *ranks, strict=True):
        if not all(relative_error(own, x, floor) <= bound for x in of_ranks):
            return node
    return None


def _returning(given: Captured, names: Sequence[str]) -> Captured:
    """The graph that returns the values of these nodes too, after its own."""
    gm = fx.GraphModule(given.graph_module, copy.deepcopy(given.graph_module.graph))
    nodes = {node.name: node for node in gm.graph.nodes}
    output = gm.graph.output_node()
    output.args = ((*output.args[0], *(nodes[name] for name in names)),)
    gm.recompile()
    return replace(given, graph_module=gm)
