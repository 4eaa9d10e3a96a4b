"""Seconds, bytes and counts in three digits, for people to read."""

from __future__ import annotations


def seconds(x: float) -> str:
    """Three digits: ``1.23 s``, ``45.6 ms``, ``78.9 us``."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if x >= factor:
            return f"{x / factor:.3g} {unit}" if x < 1000 * factor else f"{x / factor:,.0f} {unit}"
    return f"{x / 1e-6:.3g} us"


def size(num_bytes: float) -> str:
    """Three digits, in powers of 1024: ``1.23 GiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def quantity(x: float) -> str:
    """Three digits, in powers of 1000: ``1.23 P``."""
    for power, unit in ((6, "E"), (5, "P"), (4, "T"), (3, "G"), (2, "M")):
        if x >= 1000**power:
            return f"{x / 1000**power:.2f} {unit}"
    return f"{x:,.0f}"
