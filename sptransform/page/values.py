"""Numbers as people read them, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

COUNTED, SIMULATED, MEASURED = "counted", "simulated", "measured"
MEANINGS = {
    COUNTED: "read off the rewritten graph, or a formula that equals that count",
    SIMULATED: "computed by the cost model from counts and published constants of the hardware",
    MEASURED: "taken from a run",
}
_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


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


def _three_digits(x: float, unit: str) -> str:
    for size, prefix in _SI:
        if abs(x) >= size * 0.9995:
            return f"{x / size:.3g} {prefix}{unit}" if x < 999.5 * size else f"{x / size:.0f} {prefix}{unit}"
    return f"{x:.3g} {unit}".rstrip() if abs(x) < 999.5 else f"{x:.0f} {unit}".rstrip()


def byte_text(x: float) -> str:
    """``1.07 GB``: decimal units, three digits."""
    return _three_digits(x, "B")


def num_bytes(x: int, source: str = COUNTED) -> Value:
    return Value(byte_text(x), f"{x:,} bytes", source)


def count(x: int, source: str = COUNTED) -> Value:
    return Value(f"{x:,}", f"{x:,}", source)


def flops(x: int, source: str = COUNTED) -> Value:
    return Value(_three_digits(x, "FLOP"), f"{x:,} FLOP", source)


def seconds(x: float, source: str = SIMULATED) -> Value:
    """Seconds, milliseconds or microseconds."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if x >= size * 0.9995 or unit == "µs":
            return Value(
                f"{x / size:.3g} {unit}" if x < 999.5 * size else f"{x / size:.0f} {unit}", f"{x:.9g} s", source
            )
    raise AssertionError


def share(x: float, source: str = COUNTED) -> Value:
    """0.1 is ``+10%``."""
    return Value(f"+{x:.1%}", f"{x:.9g}", source)
