"""From a captured graph to the graph of one rank: one mesh dim after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.context import Context, Result
from sptransform.engine.pass_manager import DISTRIBUTED, run_passes
from sptransform.engine.pipeline import Pipeline
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import rule_at
from sptransform.ops.groups import ranks_in
from sptransform.passes import PIPELINE
from sptransform.rules.table import RuleTable
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.partition import Partition

See = Callable[[fx.Graph, Context], None]


def distribute(
    gm: fx.GraphModule, context: Context, pipeline: Pipeline = PIPELINE, see: See = lambda graph, part: None
) -> None:
    """Rewrite the captured ``gm`` in place for this rank of ``context.mesh``; sets ``context.result.mesh_dims``.

    With two mesh dims, the second distributes the graph of one rank of the first, as it would any other graph. ``see``
    is called after each dim, with the graph and that dim's context.
    """
    result = context.result
    run_passes(gm, pipeline.normalize, context)
    stages = context.strategy.stages(context.mesh, attention_heads(gm.graph, context.rules))
    _recognise_shared(gm.graph, [stage.mesh for stage in stages])
    for index, (strategy, mesh, shards_parameters) in enumerate(stages):
        outputs = context.outputs
        if not context.returns_whole and index + 1 < len(stages):
            outputs = "kept"
        elif not all(earlier.result.is_even for earlier in result.mesh_dims):
            outputs = "full"  # after uneven shares, groups may cut differently, so outputs are gathered
        part = replace(
            context,
            strategy=strategy,
            mesh=mesh,
            outputs=outputs,
            shard_parameters=context.shard_parameters and shards_parameters,
            num_ranks=context.mesh.size,
            result=Result(result.fallbacks),
        )
        notes.forget_placements(gm.graph, is_first=index == 0)
        run_passes(gm, pipeline.distribute, part)
        part.result.is_even = notes.is_even(gm.graph)
        if index + 1 < len(stages):
            _check_shares(gm.graph, part)
        see(gm.graph, part)
        result.mesh_dims += (part,)
    run_passes(gm, pipeline.finish, context, DISTRIBUTED)


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
            rule = rule_at(node, rules)
            if rule is not None and "queries" in rule.roles:
                query, key, *_ = map(dataflow.shape, dataflow.operands(node))
                found.append((query[1], key[1]))
    return found
