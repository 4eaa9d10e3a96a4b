"""From which number of ranks on one strategy moves fewer bytes than another, as their formulas say."""

from __future__ import annotations

from sptransform.planning.records import Option


def crossing(chosen: Option, other: Option) -> str:
    return ""
