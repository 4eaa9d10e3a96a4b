"""Pointwise ops and reductions that Inductor computes in one kernel, as one instruction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from sptransform.cost.instructions import Buffer, Instruction


def fused(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The instructions, with those that may be fused, and stand between two that may not, in one kernel each.

    A kernel reads what comes from outside once, and writes what is read outside. What only passes between its ops takes
    no memory. Ops are fused that read each other's results; which else Inductor finds to fuse is left out.
    """
    last_read = _last_reads(instructions)
    found: list[Instruction] = []
    at = 0
    for is_fusable, stretch in groupby(instructions, key=lambda x: x.is_fusable):
        own = list(stretch)
        at += len(own)
        found += _kernels(own, last_read, at) if is_fusable else own
    return found


def _last_reads(instructions: Sequence[Instruction]) -> dict[Buffer, int]:
    return {buffer: index for index, found in enumerate(instructions) for buffer in found.reads}


def _kernels(own: list[Instruction], last_read: dict[Buffer, int], end: int) -> Iterator[Instruction]:
    """One instruction for each connected part of ``own``, in the order of their last ops; ``end``: what comes after."""
    part = list(range(len(own)))

    def root(i: int) -> int:
        while part[i] != i:
            i = part[i]
        return i

    maker = {buffer: i for i, found in enumerate(own) for buffer in found.makes}
    for i, found in enumerate(own):
        for buffer in found.reads:
            if buffer in maker:
                part[root(maker[buffer])] = root(i)
    members: dict[int, list[Instruction]] = {}
    for i, found in enumerate(own):
        members.setdefault(root(i), []).append(found)
    order = {id(found): i for i, found in enumerate(own)}
    for together in sorted(members.values(), key=lambda x: order[id(x[-1])]):
        yield _kernel(together, last_read, end)


def _kernel(together: list[Instruction], last_read: dict[Buffer, int], end: int) -> Instruction:
    made = {buffer for found in together for buffer in found.makes}
    leaves = [x for found in together for x in found.makes if x.stays or last_read.get(x, -1) >= end]
    reads: dict[Buffer, int] = {}
    for found in together:
        for buffer, size in found.reads.items():
            if buffer not in made:
                reads[buffer] = max(reads.get(buffer, 0), size)
    written = sum(found.writes for found in together if not found.makes)  # in place
    last = together[-1]
    op = last.op if len(together) == 1 else f"{len(together)} fused, {last.op}"
    return replace(last, op=op, reads=reads, makes=leaves, scratch=0, writes=written + sum(x.size for x in leaves))
