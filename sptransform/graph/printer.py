"""One line per node: ``%linear : f32[2,16@sp,64] = aten.linear(%x, %w)``. Goldens, errors and dumps use this form.

``16@sp`` is a dimension cut over the ranks, with its local size (``16..13@sp`` where sizes differ); a tensor that is
not cut is followed by its placement, ``I``, ``R`` or ``P``. On two mesh dims ``8@outer`` and ``8@inner`` say which one
cuts, ``4@outer@inner`` is cut by both, and ``P@inner`` is the placement on one of them. A redistribution shows the
change instead of its other arguments: ``%q1 : f32[2,4@sp,64,16] = sptransform.all_to_all([%q], S(2) -> S(1))``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.sharding.placement import Placement, Shard
from sptransform.sharding.sizes import size_of

Names = Mapping[fx.Node, str]

_OWN_NAMES: Names = MappingProxyType({})

# by how many there are
_DIMS: Mapping[int, tuple[str, ...]] = {0: (), 1: ("sp",), 2: ("outer", "inner")}

_DTYPES = {
    torch.bfloat16: "bf16",
    torch.bool: "b8",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int32: "i32",
    torch.int64: "i64",
}


def tensor_type(value: torch.Tensor, *placements: Placement | None, is_local: bool = False) -> str:
    """Dtype, shape and placement of a tensor on each mesh dim, the outermost first.

    ``value`` has sizes that are whole on the last of these mesh dims, unless ``is_local``.
    """
    sizes = [str(size_of(size)) for size in value.shape]
    whole: list[tuple[str, str]] = []
    for name, placement in zip(_DIMS[len(placements)], placements, strict=True):
        if isinstance(placement, Shard):
            sizes[placement.dim] += f"@{name}"
        elif placement is not None:
            whole.append((str(placement), f"@{name}"))
    if placements and isinstance(last := placements[-1], Shard) and not is_local:
        local = [last.outer * n for n in last.partition.local_sizes]
        size = str(local[0]) if last.partition.is_even else f"{max(local)}..{min(local)}"
        sizes[last.dim] = "@".join((size, *sizes[last.dim].split("@")[1:]))
    if len(whole) == len(placements) and len({placement for placement, _ in whole}) == 1:
        suffix = f" {whole[0][0]}"
    else:
        suffix = "".join(f" {placement}{at}" for placement, at in whole)
    return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{','.join(sizes)}]{suffix}"


def _argument(x: Any, names: Names) -> str:
    if isinstance(x, fx.Node):
        return f"%{names.get(x, x.name)}"
    if isinstance(x, list | tuple):
        inside = ", ".join(_argument(each, names) for each in x)
        return f"[{inside}]" if isinstance(x, list) else f"({inside})"
    if isinstance(x, Placement):
        return str(x)
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else repr(x) if isinstance(x, str) else str(x)


def op_name(target: Any) -> str:
    """``aten.linear``, ``aten.add.Tensor``, ``getitem``: what a node calls."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _arguments(node: fx.Node, names: Names) -> list[str]:
    transitions = notes.note(node).transitions
    if transitions:
        changes = dict.fromkeys(f"{source} -> {target}" for source, target in transitions)
        return [_argument(node.args[0], names), ", ".join(changes)]
    arguments = [_argument(x, names) for x in node.args]
    return arguments + [f"{key}={_argument(x, names)}" for key, x in node.kwargs.items() if not _is_default(node, key)]


def _is_default(node: fx.Node, key: str) -> bool:
    """Whether a keyword argument can be left out: it is None, or the op's default."""
    schema = getattr(node.target, "_schema", None)
    defaults = {} if schema is None else {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return node.kwargs[key] is None or (key in defaults and node.kwargs[key] == defaults[key])


def line(node: fx.Node, *, is_local: bool = False, names: Names = _OWN_NAMES) -> str:
    """The node as one line of text; ``names`` has other names for some nodes."""
    name = names.get(node, node.name)
    tensors = dataflow.values(node)
    placements = [notes.placement_by_dim(node, output) for output in range(len(tensors))]
    types = [tensor_type(t, *p, is_local=is_local) for t, p in zip(tensors, placements, strict=True)]
    kind = f" : {', '.join(types)}" if types else ""
    if node.op == "placeholder":
        return f"%{name}{kind} = input"
    if node.op == "get_attr":
        return f"%{name}{kind} = constant {node.target}"
    arguments = _arguments(node, names)
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    return f"%{name}{kind} = {op_name(node.target)}({', '.join(arguments)})"


def text(nodes: Iterable[fx.Node], *, is_local: bool = False) -> str:
    """The nodes, one line each; pass ``graph.nodes`` for a whole graph."""
    return "\n".join(line(node, is_local=is_local) for node in nodes)
