"""Published measurements, as files of facts, and how well predicted times order them.

tests/data/measured has one table a file, with its source in the first line. None of the constants of the hardware files
comes from them, see test_hardware.py.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "data" / "measured"
SAME = 0.03  # rows that are closer than this are no pair: runs differ by as much

# group -> (what, measured, predicted) of its rows; in seconds, or in one unit a group
Groups = Mapping[Hashable, list[tuple[object, float, float]]]


def rows(table: str) -> list[dict[str, str]]:
    """The rows of a table; "-" is not published, "OOM" ran out of memory."""
    lines = (FOLDER / f"{table}.csv").read_text().splitlines()
    assert lines[0].startswith("# source: ")
    return list(csv.DictReader(lines[1:]))


def is_measured(value: str) -> bool:
    return value not in ("-", "OOM")


@dataclass(frozen=True)
class Score:
    """How predictions order what was measured.

    Attributes:
        right: pairs of one group in the right order.
        pairs: all pairs of rows of one group that differ by 3% or more.
        regret: the time of the row that is predicted to be the fastest of its group, by that of the fastest; the worst.
        error: the median of |log(predicted / measured)|.
        wrong: the pairs in the wrong order, and where the regret is.
    """

    right: int
    pairs: int
    regret: float
    error: float
    wrong: tuple[str, ...]

    @property
    def order(self) -> float:
        return self.right / self.pairs

    def line(self, table: str) -> str:
        found = f"{self.right}/{self.pairs} pairs in order ({self.order:.0%}), worst regret {self.regret:.3f}"
        return f"{table}: {found}, median |log error| {self.error:.3f}"


def score(groups: Groups) -> Score:
    """Compare rows of each group."""
    right = pairs = 0
    regret, wrong, errors = 1.0, [], []
    for key, group in groups.items():
        fastest = min(measured for _, measured, _ in group)
        chosen, taken, _ = min(group, key=lambda row: row[2])
        if taken / fastest > regret:
            regret = taken / fastest
            wrong.append(f"{key}: chose {chosen}, regret {regret:.3f}")
        for (one, a, x), (other, b, y) in combinations(group, 2):
            if abs(a - b) < SAME * max(a, b):
                continue
            pairs += 1
            right += (a < b) == (x < y)
            if (a < b) != (x < y):
                wrong.append(f"{key}: {one} / {other} measured {a / b:.3f}, predicted {x / y:.3f}")
        errors += [abs(math.log(predicted / measured)) for _, measured, predicted in group]
    return Score(right, pairs, regret, statistics.median(errors), tuple(wrong))


def worst_error(pairs: Iterable[tuple[float, float]]) -> float:
    """The largest |predicted / measured - 1| of (measured, predicted)."""
    return max(abs(predicted / measured - 1) for measured, predicted in pairs)
