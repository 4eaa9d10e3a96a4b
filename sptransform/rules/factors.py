"""Tensors of which each dimension is one factor. A dimension of size 1 has no factor."""

from __future__ import annotations

from collections.abc import Sequence

from sptransform.rules.rule import Dims, Shape
from sptransform.sharding.sizes import Size


def dim_of(name: str, size: Size) -> tuple[str, ...]:
    """The factors of a dimension: ``name``, or none if its size is 1."""
    return (name,) if size != 1 else ()


def dims_of(shape: Shape, names: Sequence[str]) -> Dims:
    """The factors of all dimensions; ``names`` has one for each."""
    return tuple(dim_of(name, size) for name, size in zip(names, shape, strict=True))


def dims_and_sizes(shape: Shape, names: Sequence[str] | None = None) -> tuple[Dims, dict[str, Size]]:
    """:func:`dims_of`, and the extent of each factor. The names are ``i0``, ``i1``, ... if none are given."""
    dims = dims_of(shape, [f"i{d}" for d in range(len(shape))] if names is None else names)
    return dims, {factor: size for factors, size in zip(dims, shape, strict=True) for factor in factors}
