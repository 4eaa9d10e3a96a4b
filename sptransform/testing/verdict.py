"""What ``verify`` finds, as data: ``str()``, ``rich`` and ``to_dict()`` show all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from rich.console import RenderableType

from sptransform.inspection import pages
from sptransform.inspection.pages import Section
from sptransform.testing.equality import Difference

# how many of the tensors that differ are listed
_MOST = 12
_KINDS = {
    "loss": "loss",
    "output": "outputs",
    "parameter": "gradients of parameters",
    "input": "gradients of inputs",
    "buffer": "buffers after the call",
}
_NUMBERS = frozenset({"tensors", "difference"})


@dataclass(frozen=True)
class Compared(Difference):
    """A tensor's difference on the rank where it is largest.

    Attributes:
        kind: "loss", "output", "parameter" or "input" (their gradients), "buffer".
        name: of the parameter or buffer; for outputs and inputs, where it is in what is returned or passed.
        error: the largest difference from one device over the largest value there. A small gradient is measured against
            a hundredth of the largest gradient instead; so are outputs, and buffers. Infinite for other shapes, for a
            tensor that only one side has, and for one that is not finite on one side only.
        rank: the rank.
    """

    rank: int

    def __str__(self) -> str:
        what = {"parameter": "the gradient of ", "input": "the gradient of the input ", "buffer": "the buffer "}
        return f"{what.get(self.kind, 'the output ' if self.kind == 'output' else 'the ')}{self.name}"


@dataclass(frozen=True)
class Verdict:
    """Whether ranks give what one device gives.

    Attributes:
        ok: whether every tensor is within the bound on every rank.
        strategy: the strategy compared.
        world_size: number of ranks, or of each mesh dim.
        processes: whether the ranks were processes, or simulated.
        bound: the largest difference that is allowed.
        why: what that bound is.
        compared: every tensor, with its difference; gradients in the order in which the backward comes to them.
        first: of tensors that differ, the first in order of execution, and where in the model that is; None if all is
            well, or if nothing could be told.
        dtype, mode, loss: what was run: "float64" or the model's own, "training" or "evaluation", and in words the
            scalar that was differentiated.
        notes: what else to know.
        reason: of a strategy that chooses, such as ``"auto"``, which one it chose and why; empty for others.
    """

    ok: bool
    strategy: str
    world_size: int | tuple[int, ...]
    processes: bool
    bound: float
    why: str
    compared: tuple[Compared, ...]
    first: str | None
    dtype: str
    mode: str
    loss: str
    notes: tuple[str, ...] = ()
    reason: str = ""

    @property
    def worst(self) -> Compared:
        """The tensor that differs most."""
        return max(self.compared, key=lambda each: each.error)

    @property
    def worst_parameter(self) -> Compared | None:
        """The parameter whose gradient differs most; None if there is no gradient."""
        return max((each for each in self.compared if each.kind == "parameter"), key=lambda x: x.error, default=None)

    @property
    def differing(self) -> tuple[Compared, ...]:
        """Tensors beyond the bound."""
        return tuple(each for each in self.compared if not each.error <= self.bound)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for ``json.dumps``; infinite differences are None."""
        data = asdict(self)
        for each in data["compared"]:
            each["error"] = each["error"] if isfinite(each["error"]) else None
        # tuples as lists, as JSON would give them back
        return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}

    def __str__(self) -> str:
        return pages.plain(self._sections())

    def __rich__(self) -> RenderableType:
        return pages.rich(self._sections())

    def _sections(self) -> list[Section]:
        return [section for section in self._all_sections() if section.rows or section.sentences]

    def _all_sections(self) -> Iterator[Section]:
        shape = self.world_size
        ranks = " x ".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)
        where = f"{self.strategy} on {ranks} {'processes' if self.processes else 'simulated ranks'}"
        sentences = [f"Largest difference: {_said(self.worst)}."]
        if (parameter := self.worst_parameter) is not None and parameter != self.worst:
            sentences.append(f"Worst parameter: {parameter.name}, {parameter.error:.1e}.")
        if self.reason:
            sentences.append(f"{self.reason[0].upper()}{self.reason[1:]}.")
        if self.first is not None:
            sentences.append(f"First difference: {self.first}")
        yield Section(f"{'Equal to' if self.ok else 'Differs from'} one device: {where}", sentences=sentences)
        differing = sorted(self.differing, key=lambda each: -each.error)
        rows = [(str(each), f"{each.error:.1e}", str(each.rank)) for each in differing[:_MOST]]
        title = f"What differs: {len(differing)} of {len(self.compared)} tensors" + (
            f", the {_MOST} that do most" if len(differing) > _MOST else ""
        )
        yield Section(title, ("tensor", "difference", "rank"), rows, numbers=_NUMBERS)
        yield Section("Compared with one device", ("what", "tensors", "difference"), [*self._rows()], numbers=_NUMBERS)
        yield Section("How", sentences=[
            f"Allowed: {self.bound:.0e} of a tensor's largest value: {self.why}.",
            f"Computed in {self.dtype}, in {self.mode} mode. Differentiated: {self.loss}.",
            *self.notes,
        ])  # fmt: skip

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for kind, words in _KINDS.items():
            errors = [each.error for each in self.compared if each.kind == kind]
            if errors:
                yield words, str(len(errors)), f"{max(errors):.1e}"


def _said(each: Compared) -> str:
    return f"{each}, {each.error:.1e} on rank {each.rank}"


def over_ranks(found: list[list[Difference]]) -> tuple[Compared, ...]:
    """Of each tensor the largest difference over ranks; a tensor that some rank lacks is in that rank's list too."""
    worst: dict[tuple[str, str], Compared] = {}
    for rank, differences in enumerate(found):
        for each in differences:
            known = worst.get((each.kind, each.name))
            if known is None or each.error > known.error:
                worst[each.kind, each.name] = Compared(each.kind, each.name, each.error, rank)
    return tuple(worst.values())
