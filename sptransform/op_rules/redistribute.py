"""Rules for the ops that an already distributed mesh dim inserted: the next mesh dim shards them like any other op."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.op_rules.pointwise import LINEAR, pointwise
from sptransform.rules.factors import dim_of
from sptransform.rules.rule import Dims, OpCall, OpRule, Resize, RuleFn, Shape
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.partition import BLOCKS_PER_RANK, Partition
from sptransform.sharding.placement import Shard, split_spec
from sptransform.sharding.sizes import Size, SymbolicSizeError, quotient

sp = torch.ops.sptransform


def _moved(*arguments: str) -> RuleFn:
    """Every dimension passes except those along which the op moves parts; the specs in ``arguments`` name these."""

    def apply(call: OpCall) -> OpRule:
        texts = [call.argument(name) for name in arguments]
        specs = [text for x in texts for text in ([x] if isinstance(x, str) else x)]
        return _passing(call, {dim for dim, _, _ in map(split_spec, specs)}, linear=True)

    return apply


def _passing(call: OpCall, moved: Iterable[int], linear: bool) -> OpRule:
    """Operand ``i`` becomes result ``i``; dimension ``d`` of several tensors is one factor where their sizes allow it.

    They do if all are equal, or if the largest is a multiple of all others (query heads and key heads). The factor then
    has the largest size, and the smaller tensors have the quotient of its partition.
    """
    sizes: dict[str, Any] = {}
    resize: dict[tuple[str, int, str], Resize] = {}
    shapes = call.operand_shapes

    def common(dim: int) -> Size | None:
        found = {shape[dim] if dim < len(shape) else None for shape in shapes}
        if len(found) == 1:
            return shapes[0][dim]
        largest = max(found) if all(isinstance(size, int) for size in found) else 0
        return largest if largest and all(largest % size == 0 for size in found) else None

    passing = {dim: None if dim in moved else common(dim) for dim in range(max(map(len, shapes)))}

    def dims(shape: Shape, side: str, index: int) -> Dims:
        named = []
        for dim, size in enumerate(shape):
            full = passing[dim]
            name = f"d{dim}" if full is not None else f"{'from' if side == 'operand' else 'to'}{index}.{dim}"
            if full is not None and full != size:
                resize[side, index, name] = Resize(lambda p, group=full // size: p.quotient(group), links=False)
            has_factor = size != 1 or (side, index, name) in resize
            named.append((name,) if has_factor else ())
            if has_factor:
                sizes[name] = size if full is None else full
        return tuple(named)

    operands = tuple(dims(shape, "operand", i) for i, shape in enumerate(shapes))
    results = tuple(dims(shape, "result", i) for i, shape in enumerate(call.result_shapes))
    return OpRule(
        operands,
        results,
        sizes,
        replicated=frozenset(name for name in sizes if not name.startswith("d")),
        linear=(frozenset(range(len(operands))),) if linear else (),
        resize=resize,
    )


def _tiles(spec: str) -> tuple[int, int | None, int]:
    """The dim that is cut, its number of tiles of equal blocks (None for any other cut), and the number of ranks."""
    dim, outer, text = split_spec(spec)
    # tiles do not depend on an open size; a zigzag's part is even, and a striped one has that many blocks
    partition = Partition.parse(text, part=2 * BLOCKS_PER_RANK)
    return dim, partition.num_tiles if outer == 1 else None, partition.num_ranks


def _all_to_all(call: OpCall) -> OpRule:
    """If a dim is moved in tiles of equal blocks, the index of the tile and the index inside the block pass.

    The former passes only if all tensors have as many tiles, the latter only if they also have the same block size.
    Heads that the next mesh dim shards further are moved this way. For any other cut, one replicated factor links the
    rank's part to the full dim: a part of a sequence is still a sequence.
    """
    ends = [list(map(_tiles, call.argument(name))) for name in ("sources", "targets")]
    moved = {dim for tensors in ends for dim, _, _ in tensors}
    passing = _passing(call, moved, linear=True)
    tensors = [list(map(list, passing.operands)), list(map(list, passing.results))]
    sizes, replicated, resize = dict(passing.sizes), set(passing.replicated), dict(passing.resize)
    for (part_side, full_side), cuts in zip(((0, 1), (1, 0)), ends, strict=True):
        shapes = (call.operand_shapes, call.result_shapes)[part_side]
        full_shapes = (call.operand_shapes, call.result_shapes)[full_side]
        for i, (dim, tiles, num_ranks) in enumerate(cuts):
            part = shapes[i][dim]
            if tiles is None or tiles * num_ranks == 1:
                name = f"part{i}.{dim}"
                sizes[name] = part
                replicated.add(name)
                tensors[part_side][i][dim] = tensors[full_side][i][dim] = (name,)
                size = full_shapes[i][dim]
                side = ("operand", "result")[full_side]
                resize[side, i, name] = Resize(lambda p, size=size: Partition.contiguous(size, p.num_ranks))
                continue
            block = quotient(part, tiles)
            same_tiles = all(cut == cuts[i] for cut in cuts)
            alike = same_tiles and all(quotient(other[dim], tiles) == block for other in shapes)
            own, own_block = (dim if same else f"{i}.{dim}" for same in (same_tiles, alike))
            names = {f"tile{own}": tiles, f"rank{own}": num_ranks, f"block{own_block}": block}
            sizes |= {name: size for name, size in names.items() if size != 1}
            tile, rank, inside = (dim_of(name, size) for name, size in names.items())
            passes = (*tile, *inside) if alike else tile if same_tiles else ()
            replicated.update({*tile, *rank, *inside} - {*passes})
            tensors[part_side][i][dim], tensors[full_side][i][dim] = (*tile, *inside), (*tile, *rank, *inside)
    left = {name for side in tensors for dims in side for names in dims for name in names}
    return replace(
        passing,
        operands=tuple(map(tuple, tensors[0])),
        results=tuple(map(tuple, tensors[1])),
        sizes={name: size for name, size in sizes.items() if name in left},
        replicated=frozenset(replicated & left),
        resize=resize,
    )


def _all_to_all_local(call: OpCall, local: Local) -> Any:
    """If a moved dim is also cut here, its spec must describe the blocks of this rank's part."""

    def held(name: str, side: str) -> list[str]:
        specs = list(call.argument(name))
        for i in range(len(specs)):
            placement = local.decision.shard(local.rule, side, i)
            if placement is not None and placement.dim == split_spec(specs[i])[0]:
                if "?" in specs[i]:
                    raise SymbolicSizeError(f"cannot share the blocks of {specs[i]} further")
                specs[i] = Shard.parse(specs[i]).held(placement, local.rank).spec
        return specs

    sources = held("sources", "result")
    targets = held("targets", "operand")
    return local.run(call, sources=sources, targets=targets)


def _replicate(call: OpCall) -> OpRule:
    """One parameter passes with any cut. Several parameters share no cut, so their dimensions stay whole."""
    is_one = len(call.operand_shapes) == 1
    return _passing(call, () if is_one else range(max(map(len, call.operand_shapes))), linear=is_one)


def _mask_local(call: OpCall, local: Local) -> Any:
    """Add this mesh dim's group: ranks that differ on any mesh dim draw different masks."""
    return local.run(call, group_name=f"{call.argument('group_name')},{local.group}")


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (sp.all_gather.default, _moved("spec")),
    (sp.all_gather_packed.default, _moved("specs")),
    (sp.all_reduce.default, pointwise(LINEAR)),
    (sp.all_to_all.default, OpEntry(_all_to_all, _all_to_all_local)),
    (sp.dropout_mask.default, OpEntry(pointwise(), _mask_local)),
    (sp.first_rank.default, pointwise(LINEAR)),
    (sp.keep_own.default, _moved("source", "target")),
    (sp.local_index.default, pointwise()),
    (sp.reduce_scatter.default, _moved("spec")),
    (sp.repartition.default, _moved("source", "target")),
    (sp.replicate.default, _replicate),
    (sp.slice.default, _moved("spec")),
]
