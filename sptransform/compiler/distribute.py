"""From a captured graph to the graph of one rank: one mesh dim after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import DISTRIBUTED, run_passes
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call
from sptransform.ops.groups import ranks_in
from sptransform.passes import DISTRIBUTE, FINISH, NORMALIZE
from sptransform.rules.table import RuleTable
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.partition import Partition

See = Callable[[fx.Graph, Context], None]


def distribute(gm: fx.GraphModule, context: Context, see: See = lambda graph, part: None) -> None:
    """Rewrite the captured ``gm`` in place for this rank of ``context.mesh``; sets ``context.parts``, one per mesh dim.

    With two mesh dims, the second distributes the graph of one rank of the first, as it would any other graph. ``see``
    is called after each dim, with the graph and that dim's context.
    """
    run_passes(gm, NORMALIZE, context)
    stages = context.strategy.stages(context.mesh, attention_heads(gm.graph, context.rules))
    _recognise_shared(gm.graph, [mesh for _, mesh in stages])
    for index, (strategy, mesh) in enumerate(stages):
        outputs = context.outputs
        if outputs != "full" and index + 1 < len(stages):
            outputs = "kept"
        elif not all(earlier.is_even for earlier in context.parts):
            outputs = "full"  # after uneven shares, groups may cut differently, so outputs are gathered
        shares = strategy.shards_weights == context.strategy.shards_weights
        part = replace(
            context,
            strategy=strategy,
            mesh=mesh,
            outputs=outputs,
            parts=(),
            shard_parameters=context.shard_parameters and shares,
            num_ranks=context.mesh.size,
        )
        notes.forget_placements(gm.graph)
        run_passes(gm, DISTRIBUTE, part)
        part.is_even = notes.is_even(gm.graph)
        if index + 1 < len(stages):
            _check_shares(gm.graph, part)
        see(gm.graph, part)
        context.parts += (part,)
    run_passes(gm, FINISH, context, DISTRIBUTED)


def _recognise_shared(graph: fx.Graph, meshes: list[Mesh]) -> None:
    """Give sharded inputs the groups of ``meshes``: other groups may have the same ranks.

    Raises:
        UsageError: an input is sharded over other ranks, or over the mesh dims in another order.
    """
    known = [ranks_in(mesh.group) for mesh in meshes if mesh.device_mesh is not None]
    for node in graph.find_nodes(op="placeholder"):
        note = notes.note(node)
        sharing = [(stored, ranks) for stored in note.stored if len(ranks := ranks_in(stored.group)) > 1]
        places = [known.index(ranks) if ranks in known else None for _, ranks in sharing]
        if None in places or places != sorted(places):
            raise UsageError(
                describe(
                    "a tensor is shared by other ranks, or in another order, than those that split it",
                    node=node,
                    found=" x ".join(f"Shard({stored.dim}) over ranks {list(ranks)}" for stored, ranks in sharing),
                    fix="a DTensor over the mesh that is given to parallelize, or x.full_tensor()",
                )
            )
        note.stored = tuple(
            replace(stored, group=meshes[at].group) for (stored, _), at in zip(sharing, places, strict=True)
        )


def _check_shares(graph: fx.Graph, part: Context) -> None:
    """Refuse uneven shares below two tokens: one is no sequence, so that rank's graph would differ. All ranks raise."""
    for node in graph.nodes:
        for partition in _of_sequences(node, part):
            sizes = partition.local_sizes
            if not partition.is_even and min(sizes) < 2:
                raise UsageError(
                    describe(
                        "a sequence is too short to be split over two mesh dims",
                        node=node,
                        found=f"{partition.size} tokens, shares of {', '.join(map(str, sizes))} on the first",
                        fix=f"pad it to a multiple of {part.mesh.size}, or split it over one mesh dim",
                    )
                )


def _of_sequences(node: fx.Node, part: Context) -> list[Partition]:
    """Partitions of the queries and the keys of an attention node."""
    note = notes.note(node)
    if note.rule is None or "queries" not in note.rule.roles:
        return []
    factors = [factor for role, factor in note.rule.roles.items() if role in ("queries", "keys")]
    return [note.decision.partition_of(factor) or part.divide(note.rule.sizes[factor]) for factor in factors]


def attention_heads(graph: fx.Graph, rules: RuleTable) -> list[tuple[int, int]]:
    """(query heads, key heads) of every attention op of the graph."""
    found = []
    for node in graph.nodes:
        if dataflow.handles_tensors(node):
            call = op_call(node)
            rule = rules.rule_of(call)
            if rule is not None and "queries" in rule.roles:
                found.append((call.operand_shapes[0][1], call.operand_shapes[1][1]))
    return found
