"""Which part of each parameter a rank is to keep: what the graph of a call reads of it. Runs no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sptransform import annotations
from sptransform.mesh import Mesh
from sptransform.options import Options
from sptransform.rewrite import rewrite_call
from sptransform.stand_ins import faked


def parameter_dims(
    model: nn.Module, options: Options, mesh: Mesh, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, int | None]:
    """For every parameter the dimension along which the ranks of ``mesh`` share it; None: each keeps the whole.

    Args:
        args, kwargs: of a call of the model; only shapes matter, so they, and the model, may be on ``meta``.
    """
    copied, (args, kwargs) = faked(model, (args, dict(kwargs)))
    rewritten = rewrite_call(copied, args, kwargs, options, Mesh.pretended(mesh.size, mesh.rank))
    found: dict[str | None, int] = {}
    for node in rewritten.graph_module.graph.find_nodes(op="placeholder"):
        note = annotations.note(node)
        if note.stored is not None:
            found[note.input_name] = note.stored.dim
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: next((found[n] for n in tied if n in found), None) for tied in names.values() for name in tied}
