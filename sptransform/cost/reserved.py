"""What CUDA's caching allocator reserves for a step: more than is held at a time, since free pieces do not fit.

As torch documents it (CUDA semantics, "Memory management") and does by default (c10/cuda/CUDACachingAllocator.cpp):
memory is asked for in segments and never given back. A request takes the smallest free block that fits, and leaves the
rest of it free; free neighbours of a segment become one block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

from sptransform.cost.records import Step

_UNIT = 512  # requests are multiples of this
_SMALL = 1 << 20  # up to this, a request is served from segments of small blocks
_SMALL_SEGMENT, _LARGE_SEGMENT, _WHOLE = 2 << 20, 20 << 20, 10 << 20  # from _WHOLE on, a segment is one request
_ROUNDED = 2 << 20


def reserved_bytes(step: Step) -> int:
    """What ``torch.cuda.max_memory_reserved()`` would say of the step, in bytes, without optimizer states.

    Layers that stand for others are unrolled. The step runs twice, since a second one finds other blocks free than the
    first. Which of several pieces of one size is freed is not known: the newest is. Collectives' streams are left out.
    """
    allocator = _Allocator()
    for _ in range(2):
        for work in step.unrolled():
            scratch = (work.scratch,) if work.scratch else ()
            for size in (*work.allocates, *scratch):
                allocator.allocate(size)
            for size in (*scratch, *work.frees):
                allocator.free(size)
        allocator.free_all()
    return step.parameters + step.inputs + allocator.reserved


@dataclass(eq=False)
class _Block:
    """A piece of a segment, and its neighbours there."""

    size: int
    is_small: bool
    before: _Block | None = None
    after: _Block | None = None


class _Allocator:
    def __init__(self) -> None:
        self.reserved = 0
        self._count = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}  # by size, then by age
        self._keys: dict[_Block, tuple[int, int, _Block]] = {}  # of free blocks
        self._live: dict[int, list[_Block]] = defaultdict(list)  # by what was asked for

    def allocate(self, size: int) -> None:
        rounded = -(-size // _UNIT) * _UNIT
        is_small = rounded <= _SMALL
        free = self._free[is_small]
        place = bisect_left(free, (rounded,))
        block = self._take(free[place][2]) if place < len(free) else self._segment(rounded, is_small)
        rest = block.size - rounded
        if rest >= _UNIT if is_small else rest > _SMALL:
            behind = _Block(rest, is_small, block, block.after)
            if block.after is not None:
                block.after.before = behind
            block.size, block.after = rounded, behind
            self._put(behind)
        self._live[size].append(block)

    def free(self, size: int) -> None:
        """Free a piece of this size; what was made as several pieces, such as gradients of a unit, as these."""
        if self._live[size]:
            self._release(self._live[size].pop())
            return
        for piece in sorted((piece for piece, blocks in self._live.items() if blocks), reverse=True):
            while piece <= size and self._live[piece]:
                self._release(self._live[piece].pop())
                size -= piece

    def free_all(self) -> None:
        for blocks in self._live.values():
            while blocks:
                self._release(blocks.pop())

    def _segment(self, size: int, is_small: bool) -> _Block:
        whole = _SMALL_SEGMENT if is_small else _LARGE_SEGMENT if size < _WHOLE else -(-size // _ROUNDED) * _ROUNDED
        self.reserved += whole
        return _Block(whole, is_small)

    def _release(self, block: _Block) -> None:
        for neighbour in (block.before, block.after):
            if neighbour in self._keys:
                self._take(neighbour)
                block.size += neighbour.size
                if neighbour is block.before:
                    block.before = neighbour.before
                else:
                    block.after = neighbour.after
        if block.before is not None:
            block.before.after = block
        if block.after is not None:
            block.after.before = block
        self._put(block)

    def _put(self, block: _Block) -> None:
        self._count += 1
        key = block.size, self._count, block
        self._keys[block] = key
        insort(self._free[block.is_small], key)

    def _take(self, block: _Block) -> _Block:
        key = self._keys.pop(block)
        free = self._free[block.is_small]
        del free[bisect_left(free, key[:2])]
        return block
