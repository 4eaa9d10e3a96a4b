"""How long a step takes at any length: the sum of what its ops take, where no message runs beside kernels.

On a given number of ranks and rows, a step has the same ops at all lengths. (A single row may save copies, so that rows
are given.) What one op computes, moves and sends is a sum of few powers of the tokens, solved for in exact arithmetic
from counts at several lengths. How long that takes on a piece of hardware :mod:`sptransform.cost.times` says. Where
messages run beside kernels, the time is no sum, but depends on the order of all ops. That is what
:func:`sptransform.cost.simulate.simulate` is for, and no formula is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import sympy

from sptransform.cost import times
from sptransform.cost.formulas import S, solved
from sptransform.cost.hardware import Hardware
from sptransform.cost.records import Step, Work

#: what the arguments of a kind of op are; those of a message are the bytes, and how many ranks and nodes take part
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "memory": ("traffic",),
    "matmul": ("flops", "traffic"),
    "attention": ("flops", "traffic", *times.ATTENTION_SIZES),
    "message": ("bytes", "ranks", "nodes"),
}
_POWERS = range(3)  # of tokens


@dataclass(frozen=True)
class Part:
    """Ops of a step that take equally long.

    Attributes:
        function: the kind of op, as :func:`function_of` names it.
        quantities: in S, in the order of :data:`ARGUMENTS`; of a message, the bytes alone.
        ranks: of a message, the global ranks of its group.
    """

    function: str
    quantities: tuple[sympy.Expr, ...]
    ranks: tuple[int, ...] = ()


def parts_of(steps: Sequence[tuple[int, Step]]) -> Mapping[Part, int] | None:
    """The parts of a step, and how often each runs; None if its ops do not follow lengths in this form.

    ``steps``: of one strategy on one number of ranks, with the tokens of each.
    """
    lengths = [tokens for tokens, _ in steps]
    works_of = [step.works for _, step in steps]
    if len(lengths) < 3 or len(set(map(len, works_of))) > 1:
        return None
    known: dict[tuple[int, ...], sympy.Expr | None] = {}
    found: Counter[Part] = Counter()
    for works in zip(*works_of, strict=True):
        if len({(work.kind, work.copies, _ranks(work)) for work in works}) > 1:
            return None
        if works[0].kind == "wait":
            continue
        if len({function_of(work) for work in works}) > 1:
            return None
        quantities = []
        for values in zip(*map(_quantities, works), strict=True):
            if values not in known:
                known[values] = _of_lengths(lengths, values)
            quantities.append(known[values])
        if None in quantities:
            return None
        found[Part(function_of(works[0]), tuple(quantities), _ranks(works[0]))] += works[0].copies
    return dict(found)


def _of_lengths(lengths: Sequence[int], values: Sequence[int]) -> sympy.Expr | None:
    """The sum of as few powers of S as can be that equals all ``values``; None if there is none, or one as short."""
    for size in range(1, len(values)):
        found = []
        for powers in combinations(_POWERS, size):
            solution = solved([[tokens**power for power in powers] for tokens in lengths], values)
            if solution is not None:
                found.append(sympy.Add(*(c * S**power for power, c in zip(powers, solution, strict=True))))
        if found:
            return found[0] if len(found) == 1 else None
    return None


def function_of(work: Work) -> str:
    """``memory``, ``matmul.bfloat16``, ``attention.backward.bfloat16``, or the kind of a message."""
    if work.kind == "message":
        # two ranks exchange: one hop
        return "send_recv" if work.message.kind == "all_to_all" and len(work.message.ranks) == 2 else work.message.kind
    if work.kind == "attention":
        return f"attention.{times.pass_of(work)}.{work.dtype}"
    return f"matmul.{work.dtype}" if work.kind == "matmul" else "memory"


def arguments_of(function: str) -> tuple[str, ...]:
    """The names of the arguments of a function."""
    return ARGUMENTS.get(function.partition(".")[0], ARGUMENTS["message"])


def time_function(function: str, hardware: Hardware) -> sympy.Expr:
    """How many seconds one op takes, in the symbols of its arguments.

    Raises:
        UsageError: the hardware lacks a constant that it depends on.
    """
    named = {name: sympy.Symbol(name, positive=True) for name in arguments_of(function)}
    kind, *how = function.split(".")
    if kind == "memory":
        return times.memory_seconds(named["traffic"], hardware)
    if kind == "matmul":
        return times.matmul_seconds(named["flops"], named["traffic"], how[0], hardware)
    if kind == "attention":
        flops, traffic, *_ = named.values()
        sizes = {name: named[name] for name in times.ATTENTION_SIZES}
        return times.attention_seconds(flops, traffic, how[0], how[1], hardware, **sizes)
    return times.message_seconds(kind, *named.values(), hardware)


@dataclass(frozen=True)
class StepTimes:
    """How long a step takes on several numbers of ranks.

    Attributes:
        parts: number of ranks -> the parts of the step there, and how often each runs.
        names: number of ranks -> the name that the strategy has there.
        rows: of the batch.
        multiple: what divides the tokens wherever this holds.
        hardware: what the step was simulated for besides those that the library knows.
    """

    parts: Mapping[int, Mapping[Part, int]]
    names: Mapping[int, str]
    rows: int
    multiple: int
    hardware: Hardware | None = None

    def seconds(self, tokens: int, rows: int, num_ranks: int, hardware: Hardware) -> float | None:
        """Of a step; None where it is not known: on other ranks, for other rows, at lengths that do not divide.

        None too where a message runs beside kernels, or finds no link.
        """
        if num_ranks not in self.parts or rows != self.rows or tokens % self.multiple:
            return None
        total = 0.0
        functions: dict[str, Any] = {}
        for part, number in self.parts[num_ranks].items():
            given = [float(each.subs(S, tokens)) for each in part.quantities]
            if part.ranks:
                if not is_added(part.ranks, hardware):
                    return None
                given += [len(part.ranks), times.nodes_of(part.ranks, hardware)]
            if part.function not in functions:
                names = sympy.symbols(arguments_of(part.function), positive=True)
                functions[part.function] = sympy.lambdify(names, time_function(part.function, hardware), "math")
            total += number * functions[part.function](*given)
        return total


def is_added(ranks: Sequence[int], hardware: Hardware) -> bool:
    """Whether kernels wait for a message over these ranks, so that its time adds to theirs."""
    return hardware.get(f"{times.link_of(ranks, hardware)}.overlaps") is False


def _ranks(work: Work) -> tuple[int, ...]:
    return work.message.ranks if work.message is not None else ()


def _quantities(work: Work) -> Iterator[int]:
    if work.kind == "message":
        yield work.message.bytes_sent
        return
    for name in arguments_of(function_of(work)):
        yield {"flops": work.flops, "traffic": work.traffic, **work.sizes}[name]
