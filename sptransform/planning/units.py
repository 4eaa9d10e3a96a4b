"""Seconds, bytes and counts in three digits, for people to read: on terminals, on pages and in the docs.

Bytes come in powers of 1024 (KiB, MiB, GiB), counts in powers of 1000. A page's script has the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence

Scales = Sequence[tuple[float, str]]

_BINARY: Scales = [(1024.0**power, unit) for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))][::-1]
_DECIMAL: Scales = [(1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")]
_TIMES: Scales = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")]
_ROUNDS_UP = 0.9995  # of a scale: in three digits that is one of it


def seconds(x: float) -> str:
    """``1.23 s``, ``45.6 ms``, ``78.9 µs``."""
    return _three_digits(x, _TIMES)


def size(num_bytes: float) -> str:
    """``1.23 GiB``, ``45.6 KiB``, ``789 B``."""
    return _three_digits(num_bytes, _BINARY)


def quantity(x: float, unit: str = "") -> str:
    """``1.23 P``; with a unit ``1.23 PFLOP``."""
    return _three_digits(x, [(scale, prefix + unit) for scale, prefix in _DECIMAL])


def _three_digits(x: float, scales: Scales) -> str:
    scale, unit = next((each for each in scales if abs(x) >= each[0] * _ROUNDS_UP), scales[-1])
    value = x / scale
    return f"{value:.3g} {unit}".rstrip() if abs(value) < 999.5 else f"{value:,.0f} {unit}".rstrip()
