"""Numbers as people read them, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from sptransform.planning import units

COUNTED, SIMULATED, MEASURED = "counted", "simulated", "measured"
MEANINGS = {
    COUNTED: "read off the rewritten graph, or a formula that equals that count",
    SIMULATED: "computed by the cost model from counts and published constants of the hardware",
    MEASURED: "taken from a run",
}

@dataclass(frozen=True)
class Value:
    """A number on a page.

    Attributes:
        text: as shown, three digits.
        exact: in full, for who points at it.
        source: "counted", "simulated" or "measured".
    """

    text: str
    exact: str
    source: str


def num_bytes(x: int, source: str = COUNTED) -> Value:
    return Value(units.size(x), f"{x:,} bytes", source)


def count(x: int, source: str = COUNTED) -> Value:
    return Value(f"{x:,}", f"{x:,}", source)


def flops(x: int, source: str = COUNTED) -> Value:
    return Value(units.quantity(x, "FLOP"), f"{x:,} FLOP", source)


def seconds(x: float, source: str = SIMULATED) -> Value:
    return Value(units.seconds(x), f"{x:.9g} s", source)


def share(x: float, source: str = COUNTED) -> Value:
    """0.1 is ``+10%``."""
    return Value(f"+{x:.1%}", f"{x:.9g}", source)
