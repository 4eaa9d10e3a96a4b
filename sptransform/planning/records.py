"""What a comparison of strategies is made of, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from sptransform.cost.formulas import Formula
from sptransform.cost.records import Step
from sptransform.cost.simulate import Timeline
from sptransform.cost.time_formulas import StepTimes
from sptransform.engine.strategy import Strategy
from sptransform.inspection.attended_work import imbalance
from sptransform.inspection.explanation import Explanation


@dataclass(frozen=True)
class Option:
    """One strategy on one mesh, and what its training step is made of.

    Attributes:
        name: short, for tables: "ulysses", "usp 8 x 8", "ring 8 x megatron 8".
        strategy: the strategy object.
        mesh: the size of each mesh dim.
        rank: the rank that is shown: the one that attends the most pairs of a query and a key; of several, the one
            whose parts of tensors are the largest.
        blocked: why the strategy cannot run this model, with the line of the user's code; None if it can. The fields
            below are None, and formulas empty, where it cannot.
        explanation: the facts of ``rank`` in the graph of few layers that was rewritten: what is redistributed where,
            and the graph. See ``copies`` of :class:`ComparisonFacts`.
        pairs: for every rank, how many pairs of a query and a key it attends in the forward, in all layers.
        step: the ops of ``rank``, forward and backward, in all layers. Counted.
        timeline: the step on the hardware. Simulated; None without hardware.
        formulas: by name, such as "forward bytes", how a count of ``step`` depends on lengths and ranks.
        times: how long ``step`` takes at other lengths and on other numbers of ranks; None without formulas.
    """

    name: str
    strategy: Strategy
    mesh: tuple[int, ...]
    rank: int = 0
    blocked: str | None = None
    explanation: Explanation | None = None
    pairs: tuple[int, ...] = ()
    step: Step | None = None
    timeline: Timeline | None = None
    formulas: Mapping[str, Formula] = field(default_factory=dict)
    times: StepTimes | None = None

    @property
    def imbalance(self) -> float:
        """By how much the attention of the busiest rank exceeds the mean: 0.1 is 10% more."""
        return imbalance(self.pairs)

    @cached_property
    def peak_bytes(self) -> int:
        """The most that the rank holds at a time, without optimizer states."""
        return self.step.peak_bytes() if self.step else 0

    @property
    def kernels(self) -> int:
        """How many kernels a rank starts, messages aside; those of a compiler may fuse more."""
        works = self.step.works if self.step else ()
        return sum(work.copies for work in works if work.kind not in ("message", "wait"))


@dataclass(frozen=True)
class ComparisonFacts:
    """Strategies side by side, for one model and its inputs.

    Attributes:
        world_size: the number of ranks.
        hardware: the name of the hardware that is simulated; None if none is.
        options: those that can run, the fastest first, without hardware the one that sends least; then those that
            are blocked.
        one_device: the step of the model on one rank; its FLOPs are those that ranks share.
        copies: paths of the layers that stand for equal ones in the graphs of options -> for how many, themselves
            included.
    """

    world_size: int
    hardware: str | None
    options: tuple[Option, ...]
    one_device: Step
    copies: Mapping[str, int]

    @property
    def runnable(self) -> tuple[Option, ...]:
        """The options that are not blocked."""
        return tuple(option for option in self.options if option.blocked is None)
