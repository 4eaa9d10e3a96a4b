"""Along which dim each parameter is sharded: as the graph of a call reads it. Runs no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sptransform.compiler.fake_models import faked
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_call
from sptransform.graph import notes
from sptransform.sharding.mesh import Mesh


def parameter_dims(
    model: nn.Module, options: Options, mesh: Mesh, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, int]:
    """Name -> the dim along which a graph for ``mesh`` shards the parameter; parameters not listed stay replicated.

    A tied parameter is listed under one of its names.

    Args:
        args, kwargs: of a call of the model; only shapes matter, so they, and the model, may be on ``meta``.
    """
    copied, (args, kwargs) = faked(model, (args, dict(kwargs)))
    rewritten = rewrite_call(copied, args, kwargs, options, Mesh.pretended(mesh.shape, mesh.rank))
    found = map(notes.note, rewritten.graph_module.graph.find_nodes(op="placeholder"))
    return {note.input_name: note.stored[0].dim for note in found if note.stored}
