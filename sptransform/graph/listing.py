"""A graph as lines to read, each with the module and the user's source line that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from sptransform.diagnostics import provenance
from sptransform.graph import dataflow, notes
from sptransform.graph.printer import line


@dataclass(frozen=True)
class Line:
    """One node.

    Attributes:
        name: of the node.
        layer: path of the module whose forward made it; "" is the model itself.
        source_line: ``file:line: code`` of the user's op; None where there is none.
        type: dtype, shape and placement of its results, as printed.
        call: what computes them, as printed.
        kind: "input", "constant", "op", "move" (it changes a placement, or sends), or "output".
        parameter: the user's name of a parameter or buffer; None for anything else.
    """

    name: str
    layer: str
    source_line: str | None
    type: str
    call: str
    kind: str
    parameter: str | None = None


def listing(nodes: Iterable[fx.Node], *, is_local: bool = False) -> tuple[Line, ...]:
    """The lines of ``nodes``, in order. Parameters, and what only changes their placement, go by the user's names."""
    nodes = list(nodes)
    names = parameter_names(nodes)
    return tuple(_line(node, is_local, names) for node in nodes)


def parameter_names(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Of each parameter and buffer, and of each of its placements, the name that the user knows."""
    names: dict[fx.Node, str] = {}
    for node in nodes:
        if node.op == "placeholder" and (notes.note(node).is_parameter or notes.note(node).is_buffer):
            names[node] = notes.note(node).input_name or node.name
        elif (picked := dataflow.projection(node)) is not None and notes.note(picked[0]).transitions:
            moved = dataflow.operands(picked[0])
            if picked[1] < len(moved) and moved[picked[1]] in names:
                names[node] = names[moved[picked[1]]]
    return names


def _line(node: fx.Node, is_local: bool, names: Mapping[fx.Node, str]) -> Line:
    head, _, call = line(node, is_local=is_local, names=names).partition(" = ")
    kind = _kind(node)
    # a bucket of parameters has the module and line of one parameter's reader, which do not fit the others
    of_parameters = kind == "move" and all(x in names for x in dataflow.operands(node))
    return Line(
        name=names.get(node, node.name),
        layer="" if of_parameters else provenance.module_path(node),
        source_line=None if of_parameters else provenance.source_line(node),
        type=head.partition(" : ")[2],
        call=call or head,
        kind=kind,
        parameter=names.get(node),
    )


def _kind(node: fx.Node) -> str:
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "constant"}.get(node.op, node.op)
    return "move" if notes.note(node).transitions or notes.note(node).mesh is not None else "op"
