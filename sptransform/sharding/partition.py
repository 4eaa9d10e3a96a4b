"""A Partition says which rank owns which indices of an axis, as half-open intervals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import sympy

from sptransform.sharding.intervals import Interval, Intervals, adjoined, intersection, storage_offsets
from sptransform.sharding.sizes import Size, SymbolicSizeError, quotient

# blocks that a rank gets in the striped layout, unless their size is asked for. A test measures the balance.
BLOCKS_PER_RANK = 32

_REGULAR = re.compile(r"(\d+|\?)/(\d+)(?:(z)|s([1-9]\d*)|s/([1-9]\d*))?")


def _share(size: Size, num: int) -> Size:
    """One of ``num`` equal parts. Raises SymbolicSizeError where a symbolic size is not known to be a multiple."""
    share = quotient(size, num) if isinstance(size, sympy.Expr) else size // num
    if share is None:
        raise SymbolicSizeError(f"{size} is not known to be a multiple of {num}")
    return share


def _blocks(share: Size, num_ranks: int) -> tuple[Intervals, ...]:
    return tuple(((rank * share, (rank + 1) * share),) for rank in range(num_ranks))


def _zigzag(share: Size, num_ranks: int) -> tuple[Intervals, ...]:
    """Two chunks of ``share`` indices per rank, the r-th from each end. The last rank's two touch: one interval."""
    chunks = [(i * share, (i + 1) * share) for i in range(2 * num_ranks)]
    pairs = tuple((chunks[rank], chunks[-1 - rank]) for rank in range(num_ranks - 1))
    return (*pairs, ((chunks[num_ranks - 1][0], chunks[num_ranks][1]),))


def _striped(block: Size, num_ranks: int, rounds: int) -> tuple[Intervals, ...]:
    """In every round each rank gets the next ``block`` indices. There are two ranks or more, so no blocks touch."""
    bounds = [i * block for i in range(rounds * num_ranks + 1)]
    return tuple(tuple(pairwise(bounds))[rank::num_ranks] for rank in range(num_ranks))


def _at(own: Intervals, start: int, stop: int) -> list[Interval]:
    """The indices that the owner of ``own`` stores at offsets ``start .. stop - 1``."""
    found, at = [], 0
    for lo, hi in own:
        first, last = max(start - at, 0), min(stop - at, hi - lo)
        if first < last:
            found.append((lo + first, lo + last))
        at += hi - lo
    return found


@dataclass(frozen=True)
class Partition:
    """Ownership of the indices ``0 .. size-1`` of an axis by ``num_ranks`` ranks.

    ``owned[r]`` lists rank r's intervals in the order in which r stores them. Intervals of different ranks
    may overlap (two ranks that need the same key head); a partition without overlap that covers the axis is
    ``exact``. Printed form: ``64/4`` is equal blocks, ``64/4z`` a zigzag of equal chunks, ``64/4s8`` stripes of 8
    indices, ``5[0:3|3:5]`` any other. An open size is ``?``, and its stripes ``?/4s/32`` are 1/32 of a rank's part.

    Raises:
        ValueError: an interval lies outside the axis.
    """

    size: Size
    owned: tuple[Intervals, ...]

    def __post_init__(self) -> None:
        for rank, intervals in enumerate(self.owned if isinstance(self.size, int) else ()):
            for lo, hi in intervals:
                if not 0 <= lo < hi <= self.size:
                    raise ValueError(f"rank {rank} owns [{lo}, {hi}), outside an axis of size {self.size}")

    @staticmethod
    def of(size: int, owned: Iterable[Iterable[Interval]]) -> Partition:
        return Partition(size, tuple(adjoined(intervals) for intervals in owned))

    @staticmethod
    def contiguous(size: int, num_ranks: int) -> Partition:
        """One block per rank, as in ``torch.chunk``: ceil(size / num_ranks) each, the last ones shorter."""
        if not isinstance(size, int):
            return Partition.blocks(size, num_ranks)
        block = -(-size // num_ranks)
        return Partition.of(size, ([(min(r * block, size), min((r + 1) * block, size))] for r in range(num_ranks)))

    @staticmethod
    def blocks(size: Size, num_ranks: int) -> Partition:
        """Equal blocks of an axis whose size (may be symbolic) is a multiple of ``num_ranks``.

        Raises:
            SymbolicSizeError: a symbolic size is not known to be a multiple.
        """
        return Partition(size, _blocks(_share(size, num_ranks), num_ranks))

    @staticmethod
    def zigzag(size: Size, num_ranks: int) -> Partition:
        """Rank r owns the r-th and the r-th last of ``2 num_ranks`` chunks: equal work under a causal mask.

        The layout of Llama 3 (Dubey et al., arXiv 2407.21783, §3.3.2). Any integer size works: the ranks' shares differ
        by at most one index. An odd index goes to the front chunk, where a query sees the fewest keys: from 100
        indices per rank on, the largest load is at most 1% above the mean. Chunks may be empty.

        Raises:
            SymbolicSizeError: a symbolic size is not known to be a multiple of ``2 num_ranks``.
        """
        if not isinstance(size, int):
            return Partition(size, _zigzag(_share(size, 2 * num_ranks), num_ranks))
        shares = [size // num_ranks + (rank < size % num_ranks) for rank in range(num_ranks)]
        front, back = [-(-share // 2) for share in shares], [share // 2 for share in shares]
        chunks = list(pairwise(accumulate([*front, *reversed(back)], initial=0)))
        return Partition.of(size, ([chunks[rank], chunks[-1 - rank]] for rank in range(num_ranks)))

    @staticmethod
    def striped(size: Size, num_ranks: int, block: int | None = None) -> Partition:
        """Blocks dealt round the ranks: rank r owns the blocks r, r + num_ranks, ... Equal work for packed documents.

        What is left after the last full round is dealt as one more round of equal, shorter blocks, so that the ranks'
        shares differ by at most one index. By default a rank gets ``BLOCKS_PER_RANK`` blocks, and those.

        Raises:
            SymbolicSizeError: a symbolic size is not known to be a multiple of all blocks, or the size of blocks is
                given, so that their number depends on it.
        """
        if not isinstance(size, int):
            if block is not None:
                raise SymbolicSizeError(f"the number of blocks of {block} depends on the size {size}")
            share = _share(size, BLOCKS_PER_RANK * num_ranks)
            return Partition(size, _striped(share, num_ranks, BLOCKS_PER_RANK))
        block = max(size // (BLOCKS_PER_RANK * num_ranks), 1) if block is None else block
        rounds, left = divmod(size, block * num_ranks)
        shares = [left // num_ranks + (rank < left % num_ranks) for rank in range(num_ranks)]
        last = pairwise(accumulate(shares, initial=size - left))
        dealt = _striped(block, num_ranks, rounds)
        return Partition.of(size, ((*own, short) for own, short in zip(dealt, last, strict=True)))

    @staticmethod
    def balanced(size: int, num_ranks: int) -> Partition:
        """One block per rank, sizes differing by at most one. For heads, because an empty rank would idle."""
        bounds = [size * r // num_ranks for r in range(num_ranks + 1)]
        return Partition.of(size, ([pair] for pair in pairwise(bounds)))

    @property
    def num_ranks(self) -> int:
        return len(self.owned)

    def local_size(self, rank: int) -> int:
        return sum(hi - lo for lo, hi in self.owned[rank])

    @cached_property
    def local_sizes(self) -> tuple[int, ...]:
        return tuple(self.local_size(rank) for rank in range(self.num_ranks))

    @property
    def is_even(self) -> bool:
        """Every rank owns the same number of indices, so its shards have the same shape on all ranks."""
        first, *others = self.local_sizes
        return all(size == first for size in others)

    @cached_property
    def is_overlapping(self) -> bool:
        """Some ranks share some of their indices, and not all, as two ranks that have two of three key heads each."""
        intervals = sorted(interval for own in set(self.owned) for interval in own)
        return not self.is_uniform and any(after[0] < before[1] for before, after in pairwise(intervals))

    @cached_property
    def is_exact(self) -> bool:
        """Every index is owned by one rank only."""
        return self.is_covering and sum(self.local_sizes) == self.size

    @cached_property
    def is_covering(self) -> bool:
        """Every index is owned."""
        if self.is_uniform:
            return True
        end = 0
        for lo, hi in sorted(interval for own in self.owned for interval in own):
            if lo > end:
                return False
            end = max(end, hi)
        return end == self.size

    @cached_property
    def is_blocks(self) -> bool:
        """Rank r owns the r-th of ``num_ranks`` equal blocks."""
        return self._is_regular(self.num_ranks, _blocks)

    @cached_property
    def is_zigzag(self) -> bool:
        """Rank r owns the r-th and the r-th last of ``2 num_ranks`` equal chunks."""
        return self._is_regular(2 * self.num_ranks, _zigzag)

    @cached_property
    def stripe(self) -> Size | None:
        """The size of the blocks that are dealt round the ranks, see :meth:`striped`; None for any other layout."""
        rounds = len(self.owned[0]) if self.num_ranks > 1 else 0
        if rounds < 2:
            return None
        lo, hi = self.owned[0][0]
        if isinstance(self.size, int):
            return hi if lo == 0 and self == Partition.striped(self.size, self.num_ranks, hi) else None
        return hi if lo == 0 and self.owned == _striped(hi, self.num_ranks, rounds) else None

    @property
    def rounds(self) -> tuple[Partition, Partition]:
        """A striped partition of known size in two: of the indices in whole blocks, and of those in shorter ones."""
        full = self.size - self.size % (self.stripe * self.num_ranks)
        return self.slice(0, full), self.slice(full, self.size)

    @property
    def is_uniform(self) -> bool:
        """A regular form of equal shares, so that every rank does the same to its part."""
        return self.is_blocks or self.is_zigzag or (self.stripe is not None and self.is_even)

    @cached_property
    def is_in_order(self) -> bool:
        """Rank r owns one block at most, before those of ranks after it."""
        bounds = [bound for own in self.owned for interval in own for bound in interval]
        return all(len(own) <= 1 for own in self.owned) and bounds == sorted(bounds)

    @cached_property
    def is_contiguous(self) -> bool:
        """Rank r owns the r-th chunk of ``torch.chunk``, as in DTensor."""
        return self.is_blocks or (isinstance(self.size, int) and self == self.contiguous(self.size, self.num_ranks))

    def _is_regular(self, num_shares: int, form: Callable[[Size, int], tuple[Intervals, ...]]) -> bool:
        # compare interval counts first: a divisibility check on a traced size would add a guard
        if [len(own) for own in self.owned] != [len(own) for own in form(1, self.num_ranks)]:
            return False
        if self.size % num_shares:
            return False
        share = self.size // num_shares
        return share > 0 and self.owned == form(share, self.num_ranks)

    def _check_number(self, operation: str) -> None:
        if not isinstance(self.size, int):
            raise SymbolicSizeError(f"cannot {operation} the partition of an axis of symbolic size {self.size}")

    def slice(self, start: int, stop: int) -> Partition:
        """Ownership of ``x[start:stop]``: intervals are clipped, nothing moves."""
        self._check_number("slice")
        clip = ([(max(lo, start) - start, min(hi, stop) - start) for lo, hi in own] for own in self.owned)
        return Partition.of(max(stop - start, 0), clip)

    def pad(self, before: int, after: int) -> Partition:
        """Ownership after padding: the owner of the first (last) index owns the padding before (after) it."""
        self._check_number("pad")
        total = before + self.size + after
        owned = []
        for own in self.owned:
            shifted = []
            for lo, hi in own:
                left = 0 if lo == 0 else lo + before
                shifted.append((left, total if hi == self.size else hi + before))
            owned.append(shifted)
        return Partition.of(total, owned)

    def divided(self, num_parts: int) -> Partition:
        """Split each rank's part, in storage order, into contiguous blocks for ``num_parts`` ranks."""
        owned = []
        for own in self.owned:
            stored = Partition.contiguous(sum(hi - lo for lo, hi in own), num_parts)
            owned += [[piece for lo, hi in part for piece in _at(own, lo, hi)] for part in stored.owned]
            owned += [[]] * (num_parts - stored.num_ranks)
        return Partition.of(self.size, owned)

    def tiled(self, times: int) -> Partition:
        """The same ownership for each of ``times`` copies of the axis, concatenated."""
        starts = [tile * self.size for tile in range(times)]
        tiled = ([(start + lo, start + hi) for start in starts for lo, hi in own] for own in self.owned)
        return Partition.of(self.size * times, tiled)

    @cached_property
    def num_tiles(self) -> int | None:
        """Number of :meth:`tiled` copies of equal blocks: 1 for plain equal blocks, None for any other layout."""
        if self.is_blocks:
            return 1
        times = len(self.owned[0]) if self.stripe is not None else 0
        return times if times and self.size == times * self.num_ranks * self.stripe else None

    def within(self, own: Intervals) -> Partition:
        """Ownership within the storage of a rank that has only the indices ``own`` of the axis."""
        kept = (storage_offsets(own, intersection(mine, own)) for mine in self.owned)
        return Partition.of(sum(hi - lo for lo, hi in own), kept)

    def refine(self, factor: int) -> Partition:
        """The same ownership after every index became ``factor`` consecutive ones."""
        if factor == 1:
            return self
        return Partition.of(self.size * factor, ([(lo * factor, hi * factor) for lo, hi in own] for own in self.owned))

    def coarsen(self, factor: int) -> Partition | None:
        """Inverse of :meth:`refine`; None where an interval does not begin and end on a multiple of ``factor``."""
        size = quotient(self.size, factor)
        owned = [[(quotient(lo, factor), quotient(hi, factor)) for lo, hi in own] for own in self.owned]
        if size is None or any(bound is None for own in owned for interval in own for bound in interval):
            return None
        return Partition.of(size, owned)

    def first_owners(self) -> Partition:
        """Every index goes to the first of its owners only."""
        owned: list[list[Interval]] = []
        taken: list[Interval] = []
        for own in self.owned:
            left = list(own)
            for lo, hi in taken:
                left = [piece for a, b in left for piece in ((a, min(b, lo)), (max(a, hi), b)) if piece[0] < piece[1]]
            owned.append(left)
            taken.extend(left)
        return Partition.of(self.size, owned)

    def quotient(self, factor: int) -> Partition:
        """The indices ``i // factor`` each rank needs for its own ``i``, without repeats: key heads for query heads."""
        owned = []
        for own in self.owned:
            needed: list[Interval] = []
            end = 0
            for lo, hi in sorted((lo // factor, -(-hi // factor)) for lo, hi in own):
                needed.append((max(lo, end), hi))
                end = max(end, hi)
            owned.append(needed)
        return Partition.of(self.size // factor, owned)

    def __str__(self) -> str:
        size = self.size if isinstance(self.size, int) else "?"
        if self.is_blocks or self.is_zigzag:
            return f"{size}/{self.num_ranks}{'' if self.is_blocks else 'z'}"
        if self.stripe is not None:
            return f"{size}/{self.num_ranks}s{f'/{len(self.owned[0])}' if size == '?' else self.stripe}"
        self._check_number("print")
        ranks = "|".join(",".join(f"{lo}:{hi}" for lo, hi in own) for own in self.owned)
        return f"{self.size}[{ranks}]"

    @staticmethod
    def parse(text: str, *, size: Size | None = None, part: Size | None = None) -> Partition:
        """Inverse of ``str``. An open size (``?``) is ``size``, or that of ranks with ``part`` indices each.

        Raises:
            ValueError: other text, or an open size that no argument gives.
        """
        if "?" not in text:
            return _parse(text)
        match = _REGULAR.fullmatch(text)
        if match is None or match[4] or (size is None and part is None):
            raise ValueError(f"not a partition: {text!r}")
        num_ranks, blocks = int(match[2]), int(match[5] or 0)
        size = size if part is None else part * num_ranks
        if match[3]:
            return Partition.zigzag(size, num_ranks)
        if match[5] is None:
            return Partition.blocks(size, num_ranks)
        if isinstance(size, int) and size % (blocks * num_ranks):
            raise ValueError(f"{size} indices are no {text}")
        return Partition(size, _striped(_share(size, blocks * num_ranks), num_ranks, blocks))


@lru_cache(maxsize=4096)
def _parse(text: str) -> Partition:
    regular = _REGULAR.fullmatch(text)
    if regular and not regular[5]:
        size, num_ranks = int(regular[1]), int(regular[2])
        if regular[4]:
            return Partition.striped(size, num_ranks, int(regular[4]))
        return (Partition.zigzag if regular[3] else Partition.contiguous)(size, num_ranks)
    match = re.fullmatch(r"(\d+)\[([\d:,|]*)\]", text)
    if match is None:
        raise ValueError(f"not a partition: {text!r}")
    owned = []
    for rank in match[2].split("|"):
        bounds = (interval.split(":") for interval in rank.split(",") if interval)
        owned.append(tuple((int(lo), int(hi)) for lo, hi in bounds))
    return Partition(int(match[1]), tuple(owned))
