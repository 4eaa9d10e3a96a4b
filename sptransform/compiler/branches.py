"""Lets Dynamo trace branches that depend on what a tensor holds, where only one side goes on, or no draw decides.

1. ``if labels.max() >= n: raise ValueError(..)``: one side only raises. The graph checks that the other side is taken,
   as Dynamo has it check an ``assert``; the error shows the user's ``raise``. Not where the model may catch it.
2. ``if torch.rand([]) < p`` for a p of 0 or 1: no number that is drawn changes it.
"""

from __future__ import annotations

import dis
import linecache
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

# Private: Dynamo's interpreter. How it jumps has no hook.
from torch._dynamo.bytecode_transformation import Instruction
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import GenericContextWrappingVariable, SymNodeVariable
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_Handler = Callable[[Any, Instruction], None]

# in which case each instruction jumps; others keep what they test
_JUMPS = {
    name: name.endswith("TRUE")
    for name in dis.opmap
    if name.startswith("POP_JUMP") and name.endswith(("IF_TRUE", "IF_FALSE"))
}

# what a side that only raises does not do: it goes on elsewhere, or leaves something behind
_LASTING = ("RETURN", "YIELD", "STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "STORE_NAME", "STORE_SUBSCR", "DELETE")

# what is true of the least and of the greatest number is true of those between, or not
_COMPARISONS = frozenset({operator.ge, operator.gt, operator.le, operator.lt})
_BELOW_1 = math.nextafter(1.0, 0.0)


def _reading(jump: _Handler, jumps_if: bool) -> _Handler:
    """``jump``, but where one of the cases above tells where to go on."""

    def read(translator: Any, instruction: Instruction) -> None:
        condition = translator.stack[-1]
        if _is_data(condition):
            holds = _whatever_is_drawn(condition)
            if holds is None:
                holds = _checked(translator, instruction, condition, jumps_if)
            if holds is not None:
                translator.pop()
                if holds == jumps_if:
                    translator.jump(instruction)
                return
        jump(translator, instruction)

    return read


def _is_data(condition: Any) -> bool:
    """Whether only the graph's tensors say what the condition is."""
    if isinstance(condition, SymNodeVariable):
        return bool(free_unbacked_symbols(condition.sym_num))
    return condition.is_tensor() and condition.source is None


def _whatever_is_drawn(condition: Any) -> bool | None:
    """What a comparison of a drawn number with another number is; None if that depends on the draw."""
    node = condition.as_proxy().node if condition.is_tensor() else None
    if node is None or node.target not in _COMPARISONS:
        return None
    drawn = [x for x in node.args if isinstance(x, fx.Node)]
    if len(drawn) != 1 or drawn[0].target is not torch.rand:
        return None
    if any(reader.target not in _COMPARISONS for reader in drawn[0].users):
        return None  # it may have been written since
    least, most = (node.target(*(end if x is drawn[0] else x for x in node.args)) for end in (0.0, _BELOW_1))
    return least if least == most else None


def _checked(translator: Any, instruction: Instruction, condition: Any, jumps_if: bool) -> bool | None:
    """What the condition is where the model goes on, which the graph then checks; None if it may go on either way."""
    sides = {jumps_if: translator.indexof[instruction.target], not jumps_if: translator.instruction_pointer}
    raising = {case: _raise_of(translator.instructions, start) for case, start in sides.items()}
    if (raising[True] is None) == (raising[False] is None) or _may_catch(translator):
        return None
    (case,) = (case for case, found in raising.items() if found is not None)
    at = raising[case]
    (holds,) = {True, False} - {case}
    condition = _as_tensor(condition, translator)
    if not holds:
        condition = condition.call_method(translator, "logical_not", [], {})
    message = f"a check of the model failed: {_source(translator.f_code.co_filename, at)}"
    translator.output.create_proxy("call_function", torch._assert_async, (condition.as_proxy(), message), {})
    return holds


def _raise_of(instructions: list[Instruction], start: int) -> Instruction | None:
    """The ``raise`` to which the instructions from ``start`` on lead, and to nothing else; None if there is none."""
    for at in instructions[start:]:
        if at.opname == "RAISE_VARARGS":
            return at
        if at.target is not None or at.opname.startswith(_LASTING):
            return None
    return None


def _may_catch(translator: Any) -> bool:
    """Whether the model may go on after an exception that is raised where it is now."""
    while translator is not None:
        for block in translator.block_stack:
            # before Python 3.11, a block without a context is a `try`
            if block.with_context is None or isinstance(block.with_context, GenericContextWrappingVariable):
                return True
        if _is_tried(translator):
            return True
        translator = translator.parent
    return False


def _is_tried(translator: Any) -> bool:
    entry = translator.current_instruction.exn_tab_entry
    while entry is not None:
        handler = translator.indexof[entry.target]
        first, second = (x.opname for x in translator.instructions[handler : handler + 2])
        # the end of a `with`, and what clears up after an exception there
        if (first, second) != ("PUSH_EXC_INFO", "WITH_EXCEPT_START") and first != "COPY":
            return True
        entry = entry.target.exn_tab_entry
    return False


def _as_tensor(condition: Any, translator: Any) -> Any:
    if condition.is_tensor():
        return condition
    proxy = translator.output.create_proxy("call_function", torch.scalar_tensor, (condition.as_proxy(),), {})
    return wrap_fx_proxy(translator, proxy)


def _source(filename: str, at: Instruction) -> str:
    """``file.py:3: raise ValueError(..)``"""
    # without folders, which differ from machine to machine: the text is a part of the program
    name, places = filename.rpartition("/")[2], at.positions
    if places is None or places.lineno is None:
        return name
    lines = [linecache.getline(filename, line).strip() for line in range(places.lineno, places.end_lineno + 1)]
    return f"{name}:{places.lineno}: {' '.join(lines)}"


@contextmanager
def branches_read() -> Iterator[None]:
    """Traces branches so, inside."""
    tables = [each.dispatch_table for each in _with_subclasses(InstructionTranslatorBase)]
    before = [list(table) for table in tables]
    for table in tables:
        for name, jumps_if in _JUMPS.items():
            table[dis.opmap[name]] = _reading(table[dis.opmap[name]], jumps_if)
    try:
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table[:] = own


def _with_subclasses(cls: type) -> Iterator[Any]:
    yield cls
    for each in cls.__subclasses__():
        yield from _with_subclasses(each)
