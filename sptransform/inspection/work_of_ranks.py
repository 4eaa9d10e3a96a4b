"""Read off a rewritten graph how much of its attention each rank computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import product

from torch import fx

from sptransform.compiler.rewrite import Rewritten
from sptransform.diagnostics import provenance
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import arguments_of
from sptransform.inspection.attended_work import Documents, intervals_of, pairs_seen
from sptransform.inspection.records import AttentionWork
from sptransform.masks.bands import Band
from sptransform.ops.ring.conditions import read, sides_of
from sptransform.ops.ring.plan import attended_pairs
from sptransform.rules.decision import Cut, Decision
from sptransform.rules.rule import OpRule
from sptransform.sharding.intervals import Intervals
from sptransform.sharding.partition import Partition


def work_of_ranks(rewritten: Rewritten, documents: Documents | None = None) -> Iterator[AttentionWork]:
    """For every attention that has a rule, the pairs that each rank computes, in all its heads and rows.

    Args:
        documents: the lengths of packed documents, for all rows alike or for each.

    Raises:
        UsageError: the documents do not fit a sequence or the number of rows.
    """
    sizes = [part.mesh.size for part in rewritten.context.result.mesh_dims]
    for node in rewritten.graph_module.graph.nodes:
        decided = notes.decided(node)
        if decided and "queries" in decided[0][0].roles:
            yield _work(node, decided, sizes, documents)


def _work(
    node: fx.Node, decided: tuple[tuple[OpRule, Decision], ...], sizes: list[int], documents: Documents | None
) -> AttentionWork:
    rule = decided[0][0]
    batch, heads, num_queries, num_keys = (_size(rule, role) for role in ("batch", "heads", "queries", "keys"))
    band, is_known = visible(node, documents is not None)
    rows: list[Intervals | None] = [None] * batch
    if documents is not None and num_queries == num_keys:
        _check_fit(node, documents, batch, num_keys)
        rows = [intervals_of(lengths) for lengths in documents] * (batch if len(documents) == 1 else 1)

    def pairs_of(queries: Intervals, row: Intervals | None) -> int:
        if row is None:
            return attended_pairs(queries, ((0, num_keys),), band.nearest, band.farthest)
        return pairs_seen(queries, row, band.nearest, band.farthest)

    pairs = []
    for ranks in product(*map(range, sizes)):
        queries, own_rows, share = ((0, num_queries),), rows, Fraction(heads)
        for role, partition, rank in _cuts(decided, ranks):
            if role == "queries":
                queries = partition.owned[rank]
            elif role == "batch":
                own_rows = [row for lo, hi in partition.owned[rank] for row in own_rows[lo:hi]]
            elif role == "heads":
                share *= Fraction(partition.local_size(rank), partition.size)
        of_head = sum(count * pairs_of(queries, row) for row, count in Counter(own_rows).items())
        pairs.append(int(share * of_head))
    return AttentionWork(
        node=node.name,
        layer=provenance.module_path(node),
        source_line=provenance.source_line(node),
        pairs=tuple(pairs),
        is_bound=not is_known,
    )


def _size(rule: OpRule, role: str) -> int:
    """The extent of a role; one of extent 1 is no factor."""
    return rule.sizes.get(rule.roles.get(role), 1)


def _cuts(
    decided: tuple[tuple[OpRule, Decision], ...], ranks: tuple[int, ...]
) -> Iterator[tuple[str | None, Partition, int]]:
    """What each mesh dim cuts, as a role, with the rank on that dim. A later dim cuts a part of the earlier one."""
    for (rule, decision), rank in zip(decided, ranks, strict=True):
        roles = {factor: role for role, factor in rule.roles.items()}
        for cut in decision.cuts() if isinstance(decision, Cut) else ():
            yield roles.get(cut.factor), cut.partition.tiled(cut.outer), rank


def _check_fit(node: fx.Node, documents: Documents, batch: int, size: int) -> None:
    if len(documents) not in (1, batch):
        found = f"documents of {len(documents)} rows, a batch of {batch}"
        raise UsageError(describe("documents are of all rows", node=node, found=found, fix="one list, or one a row"))
    longest = max(map(sum, documents))
    if longest > size:
        found = f"{longest} tokens in documents, {size} in the sequence"
        fix = "lengths whose sum is at most the sequence's; what is left is padding"
        raise UsageError(describe("documents are longer than the sequence", node=node, found=found, fix=fix))


def visible(node: fx.Node, in_documents: bool) -> tuple[Band, bool]:
    """The distances that the node's mask leaves visible, and whether it hides nothing else.

    In documents, equal numbers of a query and a key are taken to mean one document, and the difference of two numbers
    to be that of positions, as it is for positions inside of a document. Numbers that depend on no input, as those of
    chunks of equal size do, number no documents.
    """
    arguments, _ = arguments_of(node)
    band = Band(0 if arguments.get("is_causal") else arguments.get("nearest"), arguments.get("farthest"))
    program = arguments.get("mask")
    if not program:
        return band, arguments.get("attn_mask") is None
    rows, columns, tables = (list(map(dataflow.value, arguments[of] or ())) for of in ("rows", "columns", "tables"))
    conditions = read(program, sides_of(rows, columns, tables))
    if not in_documents or conditions is None:
        return band, False
    for bound in conditions.bounds:
        band &= Band(bound.nearest, bound.farthest)
    is_known = conditions.is_whole and not conditions.of_queries and not conditions.of_keys
    return band, is_known and all(map(_depends_on_input, arguments["rows"]))


def _depends_on_input(node: fx.Node) -> bool:
    seen, to_see = {node}, [node]
    for x in to_see:
        if x.op == "placeholder":
            return True
        new = [y for y in x.all_input_nodes if y not in seen]
        seen.update(new)
        to_see += new
    return False
