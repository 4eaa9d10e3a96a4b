"""One device and ranks, run and compared: on processes of this machine, or simulated in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sptransform.diagnostics.errors import (
    RankFailedError,
    RankLostError,
    RankMissingError,
    SPTransformError,
    describe,
)
from sptransform.engine.strategy import Strategy
from sptransform.frontend.parallelize import parallelize
from sptransform.testing.equality import Difference, Result, Tensors, differences
from sptransform.testing.first_difference import first_difference
from sptransform.testing.pretended import Asked
from sptransform.testing.processes import WorkerDied, WorkerError, WorkerTimeout, on_processes
from sptransform.testing.simulated import Captured, captured
from sptransform.testing.trial import OneDevice, Trial, one_device

OfRanks = list[list[Difference]]


@dataclass(frozen=True)
class Setting:
    """How one device was run: what is left of :class:`OneDevice` without its tensors; and why ranks had what strategy.

    ``reason``: of a strategy that chooses, which one it chose and why; empty for others.
    """

    bound: float
    why: str
    narrow: str | None
    dtype: str
    mode: str
    loss: str
    notes: tuple[str, ...]
    reason: str

    @staticmethod
    def of(reference: OneDevice, strategy: Strategy) -> Setting:
        """After the ranks were run, for only then has ``strategy`` chosen."""
        own = next((str(x.dtype) for x in reference.first.result.grads.values()), str(torch.get_default_dtype()))
        return Setting(
            reference.bound,
            reference.why,
            reference.narrow if reference.in_double else None,
            "float64" if reference.in_double else own.removeprefix("torch."),
            "training" if reference.is_training else "evaluation",
            reference.first.loss.words,
            reference.notes,
            strategy.reason,
        )


@dataclass(frozen=True)
class Comparison:
    """What is compared. ``options`` are further ones of :func:`parallelize`.

    With ``processes`` everything runs in new ones, also what one process is enough for: the caller's has no part in it.
    """

    trial: Trial
    asked: Asked
    processes: bool
    timeout: float
    options: dict[str, Any]

    def compare(self) -> tuple[Setting, OfRanks]:
        """How one device was run, and how each rank differs from it.

        Raises:
            SPTransformError: the model is refused.
            RankMissingError: a process did not answer in time.
            RankLostError: a process ended.
        """
        if not self.processes:
            return _on_simulated_ranks(self)
        shape = self.asked.num_ranks
        answers = self._started(prod(shape) if isinstance(shape, tuple) else shape, _on_rank)
        return answers[0][0], [found for _, found in answers]

    def in_double(self) -> tuple[OfRanks, OfRanks]:
        """How simulated ranks differ from one device, as the graph is, and with everything in it in float64."""
        return self._alone(_in_double)

    def first_difference(self, bound: float, in_double: bool, found: Sequence[Difference]) -> str:
        return self._alone(_first_difference, bound, in_double, found)

    @property
    def for_graphs(self) -> dict[str, Any]:
        """The options that simulated ranks have."""
        return {name: value for name, value in self.options.items() if name not in ("backend", "fullgraph")}

    def _alone(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._started(1, _in_one_process, function, *args)[0] if self.processes else function(self, *args)

    def _started(self, number: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        try:
            return on_processes(number, function, self, *args, timeout=self.timeout)
        except WorkerError as failure:
            # ranks that only heard of another one's error say so
            own = [error for error in failure.errors.values() if error is not None]
            raised = next((error for error in own if not isinstance(error, RankFailedError)), None)
            if raised is None:
                what = "a rank failed in a way that cannot be sent"
                message = describe(what, found=str(failure), fix="processes=False")
                raise RankFailedError(message, failure.ranks) from None
            if not isinstance(raised, SPTransformError) and hasattr(raised, "add_note"):  # from Python 3.11 on
                raised.add_note(str(failure))
            raise raised from None
        except WorkerTimeout as failure:
            what = f"ranks {failure.ranks} did not answer in time"
            fix = "a larger timeout=, or processes=False"
            raise RankMissingError(describe(what, found=str(failure), fix=fix), failure.ranks) from None
        except WorkerDied as failure:
            what = f"the processes of ranks {failure.ranks} ended"
            fix = "processes=False; where processes have to be spawned, in a script, under if __name__ == '__main__'"
            raise RankLostError(describe(what, found=str(failure), fix=fix), failure.ranks) from None


def _in_one_process(rank: int, world_size: int, comparison: Comparison, function: Any, *args: Any) -> Any:
    return function(comparison, *args)


def _on_rank(rank: int, world_size: int, comparison: Comparison) -> tuple[Setting, list[Difference]]:
    """In the process of a rank: one device, then this rank's part of the ranks, compared."""
    reference = one_device(comparison.trial)
    options = {"backend": "aot_eager", "check_timeout": comparison.timeout, **comparison.options}
    shape = comparison.asked.num_ranks
    mesh = init_device_mesh("cpu", shape) if isinstance(shape, tuple) and len(shape) > 1 else None
    if comparison.asked.strategy.chooses and comparison.asked.strategy.shards_weights:
        args, kwargs = comparison.trial.arguments(reference.in_double)
        options["inputs"] = kwargs or args
    with reference.running() as model:
        got = reference.step(parallelize(model, comparison.asked.strategy, mesh=mesh, **options))
    if not options.get("grad_sync", True):
        for grads in (got.grads, got.input_grads):
            for name in sorted(grads):  # in the same order on all ranks
                dist.all_reduce(grads[name])
    found = _compared(comparison, reference.first.result, got)
    return Setting.of(reference, comparison.asked.strategy), found


def _on_simulated_ranks(comparison: Comparison) -> tuple[Setting, OfRanks]:
    reference = one_device(comparison.trial)

    def use(graph: Captured) -> OfRanks:
        return _of_ranks(comparison, graph, reference.first.result)

    found = captured(reference, use, comparison.options.get("outputs"))
    return Setting.of(reference, comparison.asked.strategy), found


def _in_double(comparison: Comparison) -> tuple[OfRanks, OfRanks]:
    reference = one_device(comparison.trial)

    def use(graph: Captured) -> tuple[OfRanks, OfRanks]:
        as_it_is = _of_ranks(comparison, graph, reference.first.result)
        doubled = graph.in_double()
        return as_it_is, _of_ranks(comparison, doubled, doubled.step(doubled.on_one_device()))

    return captured(reference, use, comparison.options.get("outputs"))


def _of_ranks(comparison: Comparison, graph: Captured, expected: Result) -> OfRanks:
    """How the graph's ranks differ from ``expected``, of which the graph may not know all buffers."""
    results = graph.on_ranks(comparison.asked, comparison.for_graphs).run(graph.step)
    if not comparison.options.get("grad_sync", True):
        grads, of_inputs = _summed([x.grads for x in results]), _summed([x.input_grads for x in results])
        results = [replace(each, grads=grads, input_grads=of_inputs) for each in results]
    known = {name: x for name, x in expected.buffers.items() if name in results[0].buffers}
    return [_compared(comparison, replace(expected, buffers=known), each) for each in results]


def _summed(terms: Sequence[Tensors]) -> Tensors:
    return {name: sum(each[name] for each in terms) for name in terms[0]}


def _compared(comparison: Comparison, expected: Result, got: Result) -> list[Difference]:
    if comparison.options.get("outputs") == "loss":  # others are not returned
        expected = replace(expected, outputs={name: x for name, x in expected.outputs.items() if name in got.outputs})
    return [*differences(expected, got)]


def _first_difference(comparison: Comparison, bound: float, in_double: bool, found: Sequence[Difference]) -> str:
    reference = one_device(comparison.trial)

    def of_ranks(graph: Captured, expected: Result) -> OfRanks:
        return _of_ranks(comparison, graph, expected)

    return first_difference(reference, comparison.asked, comparison.for_graphs, bound, in_double, found, of_ranks)
