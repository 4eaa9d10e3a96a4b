"""What a mask program says of distances inside of a packed document, where its operands are data."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
from sympy.core.relational import Relational

from sptransform.masks.bands import Band, band_of
from sptransform.op_rules.closed_forms import RELATIONS
from sptransform.op_rules.mask_ops import AND
from sptransform.ops.mask_program import MaskProgram, Ref, Step

_DISTANCE = sympy.Symbol("distance", real=True)


def band_in_documents(program: MaskProgram, num_rows: int) -> tuple[Band, bool]:
    """The distances at which a program shows keys of the query's own document, and whether it hides nothing else.

    The operands are not known. Where a number of the query is compared with one of the key, equal ones are taken to
    mean one document, and their order to be that of positions, as it is of positions inside of a document.

    Args:
        num_rows: the number of operands that belong to queries, the program's first.
    """
    band, is_known = Band(), True
    for condition in _conditions(program, program.num_operands + len(program.steps) - 1):
        relation = _between_query_and_key(condition, program.num_operands, num_rows)
        if isinstance(relation, sympy.Eq):
            continue
        found = None if relation is None else band_of(relation)
        band, is_known = (band, False) if found is None else (band & found, is_known)
    return band, is_known


def _conditions(program: MaskProgram, index: int) -> Iterator[Step | None]:
    """The steps whose conjunction is the value ``index``; None for one that is an operand."""
    step = program.steps[index - program.num_operands] if index >= program.num_operands else None
    if step is None or step.target is not AND:
        yield step
    else:
        for value in step.args:
            yield from _conditions(program, value.index)


def _between_query_and_key(step: Step | None, num_operands: int, num_rows: int) -> Relational | None:
    """The comparison of an operand of queries with one of keys, as one of their distance with 0; else None."""
    if step is None or step.target not in RELATIONS:
        return None
    operands = [value.index for value in step.args if isinstance(value, Ref) and value.index < num_operands]
    if len(operands) != 2 or sum(index < num_rows for index in operands) != 1:
        return None
    return RELATIONS[step.target](*(_DISTANCE if index < num_rows else 0 for index in operands))
