"""Terms of :mod:`index_masks` as arguments of ``ring_attention``: bounds of the distance, operands, and a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.integrations.index_masks import KEY, QUERY, All, Apply, Band, Either, Term, Values, conjuncts

_Token = tuple[str, int]

# the program's name of an operator
_OVERLOADS = {
    "eq": "eq.Tensor",
    "ge": "ge.Tensor",
    "gt": "gt.Tensor",
    "le": "le.Tensor",
    "lt": "lt.Tensor",
    "sub": "sub.Tensor",
}


class PositionMask:
    """Which keys each query sees: where all ``terms`` are true. ``device`` is that of the tensors among them.

    ``visible``: boolean [B, all tokens so far], False for padding, which is among the terms; None if there is none.
    ``first_query``: the index of the first query among these tokens.
    """

    ndim = 4  # a mask that is ready, as one of four dimensions: it is handed on as it is

    def __init__(
        self,
        num_queries: int,
        num_keys: int,
        device: torch.device,
        terms: list[Term],
        visible: Tensor | None = None,
        first_query: int | Tensor = 0,
    ) -> None:
        self.num_queries, self.num_keys, self.device, self.terms = num_queries, num_keys, device, terms
        self.visible, self.first_query = visible, first_query

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(_NO_TENSOR)

    def __add__(self, other: Any) -> Any:
        raise TypeError(_NO_TENSOR)

    __radd__ = __add__

    def also(self, term: Term) -> PositionMask:
        sizes = self.num_queries, self.num_keys, self.device
        return PositionMask(*sizes, [*self.terms, term], self.visible, self.first_query)

    def arguments(self) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
        """``rows``, ``columns``, and by name ``mask``, ``nearest`` and ``farthest`` of ``ring_attention``."""
        nearest: int | None = None
        farthest: int | None = None
        others: list[Term] = []
        for term in self.terms:
            for part in conjuncts(term):
                if not isinstance(part, Band):
                    others.append(part)
                    continue
                if part.nearest is not None:
                    nearest = part.nearest if nearest is None else max(nearest, part.nearest)
                if part.farthest is not None:
                    farthest = part.farthest if farthest is None else min(farthest, part.farthest)
        program = _Program(self)
        if others:
            program.write(All(others))
        bounds = {"mask": program.text(), "nearest": nearest, "farthest": farthest}
        return program.rows, program.columns, bounds


_NO_TENSOR = (
    "this model computes with its attention mask, which attn_implementation='sptransform' gives as a function of "
    "positions and not as a tensor\n  fix: attn_implementation='sdpa'"
)


class _Program:
    """Writes a program; the numbers of its operands are known once it is written, so until then they have names."""

    def __init__(self, mask: PositionMask) -> None:
        self._mask = mask
        self.rows: list[Tensor] = []
        self.columns: list[Tensor] = []
        self._steps: list[tuple[str, list[Any]]] = []

    def write(self, term: Term) -> _Token:
        if isinstance(term, Values):
            return self._operand(term)
        if isinstance(term, Apply):
            return self._step(_OVERLOADS[term.op], self.write(term.left), self.write(term.right))
        if isinstance(term, Band):
            return self._band(term)
        assert isinstance(term, All | Either)
        token = self.write(term.parts[0])
        for part in term.parts[1:]:
            joined = "logical_and" if isinstance(term, All) else "logical_or"
            token = self._step(joined, token, self.write(part))
        return token

    def text(self) -> str:
        if not self._steps:
            return "%0" if self.rows or self.columns else ""
        num_operands = len(self.rows) + len(self.columns)
        written = []
        for number, (op, args) in enumerate(self._steps):
            shown = ", ".join([self._shown(x) for x in args])
            written.append(f"%{num_operands + number} = {op}({shown})")
        return "; ".join(written)

    def _shown(self, x: Any) -> str:
        if not isinstance(x, tuple):
            return str(x)
        kind, index = x
        first = {"row": 0, "column": len(self.rows), "step": len(self.rows) + len(self.columns)}
        return f"%{first[kind] + index}"

    def _step(self, op: str, *args: Any) -> _Token:
        self._steps.append((op, list(args)))
        return "step", len(self._steps) - 1

    def _operand(self, term: Values) -> _Token:
        kind, operands = ("row", self.rows) if term.side == QUERY else ("column", self.columns)
        for index, known in enumerate(operands):
            if known is term.tensor:
                return kind, index
        operands.append(term.tensor)
        return kind, len(operands) - 1

    def _band(self, band: Band) -> _Token:
        """Bounds that are not those of the whole mask."""
        mask = self._mask
        queries = torch.arange(mask.num_queries, device=mask.device)[None, None, :, None]
        keys = torch.arange(mask.num_keys, device=mask.device)[None, None, None, :]
        distance = self._step("sub.Tensor", self._operand(Values(queries, QUERY)), self._operand(Values(keys, KEY)))
        bounds = [("ge.Scalar", band.nearest), ("le.Scalar", band.farthest)]
        tokens = [self._step(op, distance, bound) for op, bound in bounds if bound is not None]
        return tokens[0] if len(tokens) == 1 else self._step("logical_and", *tokens)
