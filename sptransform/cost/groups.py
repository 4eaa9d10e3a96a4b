"""The process groups of a rewritten graph: the global ranks of each, pretended or real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from sptransform.compiler.rewrite import Rewritten
from sptransform.ops.groups import pretend, ranks_in

Groups = Mapping[str, tuple[int, ...]]


def groups_of(rewritten: Rewritten) -> Groups:
    """The name of each group that the graph may send over -> its global ranks, in the group's order.

    Of pretended ranks, those of an inner mesh dim are neighbours.
    """
    whole = rewritten.context.mesh
    dims = [part.mesh for part in rewritten.context.result.mesh_dims]
    if whole.device_mesh is not None:
        return {mesh.group: ranks_in(mesh.group) for mesh in (whole, *dims)}
    found = {whole.group: tuple(range(whole.size))}
    if len(dims) == 2:
        outer, inner = dims
        found[outer.group] = tuple(i * inner.size + inner.rank for i in range(outer.size))
        found[inner.group] = tuple(outer.rank * inner.size + i for i in range(inner.size))
    elif dims and dims[0].group not in found:
        found[dims[0].group] = tuple(range(whole.size))
    return found


@contextmanager
def as_rank(rank: int, groups: Groups) -> Iterator[None]:
    """Within the block, this process is ``rank`` in all ``groups``, for ops that read their own rank."""
    with ExitStack() as stack:
        for name, ranks in groups.items():
            stack.enter_context(pretend(name, ranks.index(rank)))
        yield
