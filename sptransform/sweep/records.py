"""What came of one architecture under one strategy on some ranks: a record, a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path


class Status(str, Enum):
    """Ordered from good to bad; the last two are our mistakes."""

    EXACT = "exact"
    GATHERED = "exact, gathered"
    REFUSED = "refused"
    NOT_BUILT = "not built"
    CRASHED = "crashed"
    WRONG = "wrong"


class Need(str, Enum):
    """Why an op gets a whole tensor."""

    NATURE = "needs it whole"  # its rule says so
    FORM = "no rule for this form"
    RULE = "no rule"


@dataclass(frozen=True)
class Gathered:
    """What is gathered for one kind of op, or computed whole on every rank from what they all have: then 0 bytes."""

    op: str
    need: Need
    bytes: int


@dataclass(frozen=True)
class Record:
    """One outcome.

    Attributes:
        architecture, family, strategy, ranks, versions: what it is of; ``strategy`` is empty for one that is not built.
        dtype: what it was compared in.
        mode: "train", or "eval" for models that are random when they train.
        reason: the first line of the error, or how far off which tensor is.
        fix: what the error says would help.
        error: the largest difference from one device, relative.
        gathered: what ops get whole.
        seconds: how long it took.
    """

    architecture: str
    family: str
    strategy: str
    ranks: int
    status: Status
    versions: Mapping[str, str]
    dtype: str = ""
    mode: str = ""
    reason: str = ""
    fix: str = ""
    error: float | None = None
    gathered: tuple[Gathered, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    def line(self) -> str:
        return json.dumps(asdict(self))

    @property
    def key(self) -> tuple[object, ...]:
        return self.architecture, self.strategy, self.ranks, *sorted(self.versions.items())

    @property
    def by_nature(self) -> bool:
        """Whether it is exact, and nothing is gathered but what ops need by their nature."""
        exact = self.status in (Status.EXACT, Status.GATHERED)
        return exact and all(each.need is Need.NATURE for each in self.gathered if each.bytes)


def of_line(line: str) -> Record:
    found = json.loads(line)
    gathered = tuple(Gathered(each["op"], Need(each["need"]), each["bytes"]) for each in found["gathered"])
    return Record(**{**found, "status": Status(found["status"]), "gathered": gathered})


def read(file: Path) -> list[Record]:
    """The records of a file, the last of those with one key; a line that was cut off by an interruption is left out.

    Whether an architecture was built is what its last record says.
    """
    found: dict[tuple[object, ...], Record] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = of_line(line)
        except json.JSONDecodeError:
            continue
        found.pop(record.key, None)
        found[record.key] = record
    is_built = {record.architecture: record.status is not Status.NOT_BUILT for record in found.values()}
    return [x for x in found.values() if is_built[x.architecture] == (x.status is not Status.NOT_BUILT)]


def append(file: Path, records: Iterable[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        for record in records:
            out.write(record.line() + "\n")
