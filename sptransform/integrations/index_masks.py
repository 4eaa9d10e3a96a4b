"""Attention masks written as functions of indices, read by calling them with symbols.

    def mask(batch, head, query, key):
        return (key <= query) & (document[batch, query] == document[batch, key])

Called with symbols, the function shows what it is made of, and no tensor of queries x keys exists. What depends on
queries alone is a tensor ``[batch, 1, queries, 1]``; on keys alone, or on neither, one of ``[batch, 1, 1, keys]``. What
depends on both is an expression. A comparison of two positions is a :class:`Band`, bounds of their distance.

torch.compile traces all of this: classes are plain, and the only thing that is taken from torch is the lookup of
a tensor at a symbol (:class:`Lookups`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

QUERY, KEY = "query", "key"

_OPS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": torch.eq,
    "floor_divide": torch.floor_divide,
    "ge": torch.ge,
    "gt": torch.gt,
    "le": torch.le,
    "lt": torch.lt,
    "sub": torch.sub,
}
_REVERSED = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}


class UnreadableMaskError(Exception):
    """The function does something with its indices that is not known here."""


class Term:
    """A function of (batch, query, key); its operators give further ones."""

    device = None  # masks move results to the device of others, which is the same here
    __hash__ = None

    def to(self, device: Any) -> Term:
        return self

    def __and__(self, other: Term) -> Term:
        return All([*_parts(self, All), *_parts(other, All)])

    def __or__(self, other: Term) -> Term:
        return Either([*_parts(self, Either), *_parts(other, Either)])

    def __bool__(self) -> bool:
        raise UnreadableMaskError

    def __ne__(self, other: Any) -> Term:
        raise UnreadableMaskError

    def __eq__(self, other: Any) -> Term:
        return _apply("eq", self, other)

    def __le__(self, other: Any) -> Term:
        return _apply("le", self, other)

    def __lt__(self, other: Any) -> Term:
        return _apply("lt", self, other)

    def __ge__(self, other: Any) -> Term:
        return _apply("ge", self, other)

    def __gt__(self, other: Any) -> Term:
        return _apply("gt", self, other)

    def __sub__(self, other: Any) -> Term:
        return _apply("sub", self, other)

    def __floordiv__(self, other: Any) -> Term:
        return _apply("floor_divide", self, other)


class All(Term):
    """True where all ``parts`` are; without parts, everywhere."""

    def __init__(self, parts: list[Term]) -> None:
        self.parts = parts


class Either(Term):
    """True where one of ``parts`` is."""

    def __init__(self, parts: list[Term]) -> None:
        self.parts = parts


class Apply(Term):
    """``op`` of a term of queries and one of keys."""

    def __init__(self, op: str, left: Term, right: Term) -> None:
        self.op, self.left, self.right = op, left, right


class Band(Term):
    """True where ``nearest <= i - j <= farthest`` for the i-th query and the j-th key; None is no bound.

    ``in_documents``: so it is for tokens of one document, the only ones that the mask lets see each other.
    """

    def __init__(self, nearest: int | None = None, farthest: int | None = None, in_documents: bool = False) -> None:
        self.nearest, self.farthest, self.in_documents = nearest, farthest, in_documents


class Values(Term):
    """A tensor of 4 dimensions, of queries (``[.., queries, 1]``), of keys (``[.., 1, keys]``) or of neither."""

    def __init__(self, tensor: Tensor, side: str | None) -> None:
        self.tensor, self.side = tensor, side


class Position(Values):
    """The position of every query or key: ``shift`` + its index, or + what ``source`` [B, S] has at its index.

    A source numbers the tokens of each document, so within one the distance of positions is that of indices.
    """

    def __init__(self, tensor: Tensor, side: str, shift: int | Tensor, source: Tensor | None = None) -> None:
        super().__init__(tensor, side)
        self.shift, self.source = shift, source

    def new_ones(self, size: tuple[int, ...], dtype: torch.dtype) -> Term:
        """How masks begin a conjunction."""
        return All([])

    def new_zeros(self, size: tuple[int, ...], dtype: torch.dtype) -> Term:
        """How masks begin a disjunction."""
        return Either([])

    def __add__(self, other: int) -> Position:
        return self._moved(other)

    def __sub__(self, other: Any) -> Term:
        if isinstance(other, int):
            return self._moved(-other)
        distance = _distance(self, other) if isinstance(other, Position) else None
        return _apply("sub", self, other) if distance is None else distance

    def _moved(self, by: int) -> Position:
        return Position(self.tensor + by, self.side, self.shift + by, self.source)


class Distance(Term):
    """``sign * (i - j) + shift`` for the i-th query and the j-th key, or its absolute value."""

    def __init__(self, sign: int, shift: int, in_documents: bool, absolute: bool = False) -> None:
        self.sign, self.shift, self.in_documents, self.absolute = sign, shift, in_documents, absolute

    def __abs__(self) -> Distance:
        return Distance(self.sign, self.shift, self.in_documents, True)


class Batch:
    """The index of a sequence in the batch."""


class Lookups(TorchFunctionMode):
    """Within it, ``x[batch, position]`` and ``x[batch]`` of a tensor x [B, ..] are terms."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(x, Batch | Term) for x in index):
                return _looked_up(args[0], index)
        return func(*args, **(kwargs or {}))


def read(
    mask: Callable[..., Any],
    num_queries: int,
    num_keys: int,
    first_query: int | Tensor,
    first_key: int | Tensor,
    device: torch.device,
) -> Term:
    """What ``mask`` (batch, head, query, key) computes for queries and keys that are numbered from the first on.

    Raises:
        UnreadableMaskError: it is no function of positions and of tensors looked up at them.
    """
    queries = torch.arange(num_queries, device=device) + first_query
    keys = torch.arange(num_keys, device=device) + first_key
    query = Position(queries[None, None, :, None], QUERY, first_query)
    key = Position(keys[None, None, None, :], KEY, first_key)
    with Lookups():
        visible = mask(Batch(), None, query, key)
    if _measures_documents(visible) and not any(compares_queries(x) for x in conjuncts(visible)):
        raise UnreadableMaskError  # what is compared are not positions in documents
    return visible


def _measures_documents(term: Term) -> bool:
    if isinstance(term, All | Either):
        return any(_measures_documents(part) for part in term.parts)
    return isinstance(term, Band) and term.in_documents


def same(of_queries: Tensor, of_keys: Tensor) -> Term:
    """True where what a query has, of ``of_queries`` [B, queries], is what a key has, of ``of_keys`` [B, keys]."""
    return Apply("eq", Values(of_queries[:, None, :, None], QUERY), Values(of_keys[:, None, None, :], KEY))


def compares_queries(term: Term) -> bool:
    """Whether a term asks that what one tensor has at the query is what it has at the key, as documents do."""
    if not isinstance(term, Apply) or term.op != "eq":
        return False
    left, right = term.left, term.right
    return isinstance(left, Position) and isinstance(right, Position) and left.source is right.source


def conjuncts(term: Term) -> list[Term]:
    """The terms that are all true where ``term`` is."""
    return _parts(term, All)


def _parts(term: Term, kind: type) -> list[Term]:
    return term.parts if isinstance(term, kind) else [term]


def _looked_up(x: Tensor, index: tuple[Any, ...]) -> Term:
    if x.dim() != len(index) or not isinstance(index[0], Batch):
        raise UnreadableMaskError
    if len(index) == 1:
        return Values(x[:, None, None, None], None)
    at = index[1]
    if x.dim() != 2 or not isinstance(at, Position) or at.source is not None:
        raise UnreadableMaskError
    positions = at.tensor.flatten()
    if isinstance(at.shift, int):
        is_whole = at.shift == 0 and x.shape[1] == positions.shape[0]
        picked = x if is_whole else x[:, at.shift : at.shift + positions.shape[0]]
    else:
        picked = x.index_select(1, positions)
    view = picked[:, None, :, None] if at.side == QUERY else picked[:, None, None, :]
    return Position(view, at.side, at.shift, x)


def _apply(op: str, left: Term, right: Any) -> Term:
    if isinstance(left, Distance) and isinstance(right, int):
        return _bounded(op, left, right)
    if isinstance(left, Position) and isinstance(right, Position) and op in _REVERSED:
        distance = _distance(left, right)
        if distance is not None:
            return _bounded(op, distance, 0)
    if isinstance(left, Position) and op == "ge" and left.source is None and isinstance(left.shift, int):
        if isinstance(right, int) and right <= 0 <= left.shift:
            return All([])  # how masks say that all is visible
    if not isinstance(left, Values) or not isinstance(right, Values | int):
        raise UnreadableMaskError
    if isinstance(right, int):
        return Values(_OPS[op](left.tensor, right), left.side)
    if left.side is None or right.side is None or left.side == right.side:
        return Values(_OPS[op](left.tensor, right.tensor), left.side or right.side)
    return Apply(op, left, right)


def _distance(left: Position, right: Position) -> Distance | None:
    """``left - right``; None if they are not of one source, or begin at what is known only when it runs."""
    if left.side == right.side or left.source is not right.source:
        return None
    if not isinstance(left.shift, int) or not isinstance(right.shift, int):
        return None
    return Distance(1 if left.side == QUERY else -1, left.shift - right.shift, left.source is not None)


def _bounded(op: str, distance: Distance, limit: int) -> Band:
    """``distance op limit``."""
    if op not in _REVERSED:
        raise UnreadableMaskError
    if distance.absolute:
        if distance.shift != 0 or op not in ("le", "lt"):
            raise UnreadableMaskError
        reach = limit if op == "le" else limit - 1
        return Band(-reach, reach, distance.in_documents)
    limit = (limit - distance.shift) * distance.sign
    op = op if distance.sign > 0 else _REVERSED[op]
    if op in ("ge", "gt"):
        return Band(limit + (op == "gt"), None, distance.in_documents)
    return Band(None, limit - (op == "lt"), distance.in_documents)
