"""``verify``: does this model, under this strategy, give on N ranks what it gives on one device?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from sptransform.compiler.options import Options
from sptransform.diagnostics.errors import RankFailedError, RankLostError, RankMissingError, SPTransformError, UsageError, describe
from sptransform.frontend.parallelize import parallelize
from sptransform.strategies.names import StrategyLike
from sptransform.testing.equality import Difference, Result, Tensors, differences
from sptransform.testing.first_difference import first_difference
from sptransform.testing.pretended import Asked
from sptransform.testing.processes import WorkerDied, WorkerError, WorkerTimeout, on_processes
from sptransform.testing.rounding import TOLERANCE_IN_DOUBLE
from sptransform.testing.simulated import Captured, captured
from sptransform.testing.trial import OneDevice, Trial, one_device
from sptransform.testing.verdict import Compared, Verdict, over_ranks


def verify(
    model: nn.Module | Callable[[], nn.Module],
    strategy: StrategyLike,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    world_size: int | tuple[int, ...],
    processes: bool = True,
    rtol: float | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> Verdict:
    """Run ``model`` on one device and on ``world_size`` ranks, on this machine's CPU, and compare all that it gives.

    Compared are the loss, every output, the gradient of every parameter and of every input that requires one, and the
    buffers after the call. Both run in float64, as far as the model lets them; how much may differ is told by what it
    computes in fewer bits. The model is copied, to the CPU if it is elsewhere, and stays as it is: parameters, gradients,
    buffers, mode, and the generators of random numbers.

    Args:
        model: the unmodified module; or a function that makes one, with the same weights whenever it is called after
            ``torch.manual_seed(0)``.
        strategy: as for :func:`parallelize`.
        inputs: keyword arguments (a mapping) or positional ones (a tuple) of one call.
        world_size: number of ranks, 2 or more; a tuple has the size of each mesh dim.
        processes: start a gloo process for each rank, and call the model as users do. False: simulate the ranks in this
            process, on the same rewritten graphs.
        rtol: how far a tensor may differ, relative to its largest value. Default: what rounding explains, see
            docs/verify.md; :attr:`Verdict.why` says it.
        loss: the scalar to differentiate, as a function of what the model returns. Default: the output's ``loss``; an
            output that is a scalar; else a random projection of all floating-point outputs.
        timeout: seconds that the processes may take.
        options: further options of :func:`parallelize`. ``backend`` is "aot_eager" by default, and for processes only.

    Raises:
        SPTransformError: the model is refused, as :func:`parallelize` would refuse it.
        RankMissingError: a process did not answer in time; the message has the stack that it was in.
        RankLostError: a process ended.
    """
    trial = Trial.of(model, inputs, loss)
    request = _Request(trial, strategy, world_size, processes, timeout, options)
    request.check(rtol)
    setting, found = request.compare()
    if rtol is not None:
        setting = replace(setting, bound=float(rtol), why="rtol")
    compared, in_double = over_ranks(found), False
    largest = max(each.error for each in compared)
    if not largest <= setting.bound and setting.narrow and rtol is None and options.get("fullgraph", True):
        why = (
            f"it computes in {setting.narrow}, and differs by up to {largest:.1e} as it is; compared here with all of "
            "that in float64, on simulated ranks, where rounding is smaller and a mistake is not"
        )
        compared, in_double = over_ranks(request.alone(_in_double)), True
        setting = replace(setting, bound=TOLERANCE_IN_DOUBLE, why=why)
    ok = all(each.error <= setting.bound for each in compared)
    first = None if ok else request.alone(_first, setting.bound, in_double, compared)
    return Verdict(
        ok, str(request.asked.strategy), world_size, processes, setting.bound, setting.why, compared, first,
        setting.dtype, setting.mode, setting.loss, setting.notes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Setting:
    """How one device was run, as a process can send it."""

    bound: float
    why: str
    narrow: str | None
    dtype: str
    mode: str
    loss: str
    notes: tuple[str, ...]

    @staticmethod
    def of(reference: OneDevice) -> _Setting:
        own = next((str(x.dtype) for x in reference.first.result.grads.values()), str(torch.get_default_dtype()))
        return _Setting(
            reference.bound,
            reference.why,
            reference.narrow if reference.in_double else None,
            "float64" if reference.in_double else own.removeprefix("torch."),
            "training" if reference.is_training else "evaluation",
            reference.first.loss.words,
            reference.notes,
        )


@dataclass(frozen=True)
class _Request:
    """What is to be compared, and in which processes."""

    trial: Trial
    strategy: StrategyLike
    world_size: int | tuple[int, ...]
    processes: bool
    timeout: float
    options: dict[str, Any]

    @property
    def asked(self) -> Asked:
        return Asked(self.world_size, Options.of({"strategy": self.strategy}).strategy)

    def check(self, rtol: float | None) -> None:
        """Raises UsageError before anything is run."""
        known = {name: value for name, value in self.options.items() if name != "fullgraph"}
        chosen = Options.of({**known, "strategy": self.strategy})
        shape = self.world_size if isinstance(self.world_size, tuple) else (self.world_size,)
        if not all(isinstance(n, int) for n in shape) or prod(shape) < 2:
            what = "verify compares several ranks with one device"
            raise UsageError(describe(what, found=f"world_size={self.world_size!r}", fix="world_size=2 or more"))
        chosen.strategy.pretended_mesh(self.world_size)
        for name, value in (("timeout", self.timeout), ("rtol", rtol)):
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise UsageError(describe(f"{name} is a positive number", found=repr(value), fix=f"{name}=1e-6"))
        if chosen.mesh is not None:
            found, fix = "mesh=", "world_size=2, or a tuple with the size of each mesh dim"
            raise UsageError(describe("verify makes the mesh itself", found=found, fix=fix))
        if chosen.outputs == "local":
            found, fix = "outputs='local'", "outputs='dtensor' or 'full', which hold the same"
            raise UsageError(describe("parts of outputs are not compared", found=found, fix=fix))
        simulated = () if self.processes else ("backend", "fullgraph", "shard_parameters")
        for name in simulated:
            if (value := self.options.get(name)) is not None and value is not (name == "fullgraph"):
                what = f"simulated ranks have no {name}"
                raise UsageError(describe(what, found=f"{name}={value!r}", fix="processes=True"))

    @property
    def for_graphs(self) -> dict[str, Any]:
        """The options of one graph."""
        return {name: value for name, value in self.options.items() if name not in ("backend", "fullgraph")}

    def compare(self) -> tuple[_Setting, list[list[Difference]]]:
        """How one device was run, and how each rank differs from it."""
        if not self.processes:
            return _on_simulated_ranks(self)
        answers = self._started(prod([self.world_size] if isinstance(self.world_size, int) else self.world_size), _on_rank)
        return answers[0][0], [found for _, found in answers]

    def alone(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(self, *args)``, in a process of its own if there are any."""
        return self._started(1, _alone, function, *args)[0] if self.processes else function(self, *args)

    def _started(self, number: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        try:
            return on_processes(number, function, self, *args, timeout=self.timeout)
        except WorkerError as failure:
            # ranks that only heard of another one's error say so
            own = [error for error in failure.errors.values() if error is not None]
            raised = next((error for error in own if not isinstance(error, RankFailedError)), None)
            if raised is None:
                what = "a rank failed, with an error that cannot be sent"
                raise RankFailedError(describe(what, found=str(failure), fix="processes=False"), failure.ranks) from None
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


def _alone(rank: int, world_size: int, request: _Request, function: Callable[..., Any], *args: Any) -> Any:
    return function(request, *args)


def _on_rank(rank: int, world_size: int, request: _Request) -> tuple[_Setting, list[Difference]]:
    """In the process of a rank: one device, then this rank's part of the ranks, compared."""
    reference = one_device(request.trial)
    options = {"backend": "aot_eager", "check_timeout": request.timeout, **request.options}
    shape = request.world_size
    mesh = init_device_mesh("cpu", shape) if isinstance(shape, tuple) and len(shape) > 1 else None
    with reference.running() as model:
        got = reference.step(parallelize(model, request.strategy, mesh=mesh, **options))
    if not options.get("grad_sync", True):
        for grads in (got.grads, got.input_grads):
            for name in sorted(grads):  # in the same order on all ranks
                dist.all_reduce(grads[name])
    return _Setting.of(reference), _compared(request, reference.first.result, got)


def _on_simulated_ranks(request: _Request) -> tuple[_Setting, list[list[Difference]]]:
    reference = one_device(request.trial)

    def use(graph: Captured) -> list[list[Difference]]:
        return _of_ranks(request, graph, reference.first.result)

    return _Setting.of(reference), captured(reference, use, request.options.get("outputs"))


def _in_double(request: _Request) -> list[list[Difference]]:
    def use(graph: Captured) -> list[list[Difference]]:
        graph = graph.in_double()
        return _of_ranks(request, graph, graph.step(graph.on_one_device()))

    return captured(one_device(request.trial), use, request.options.get("outputs"))


def _of_ranks(request: _Request, graph: Captured, expected: Result) -> list[list[Difference]]:
    """How the graph's ranks differ from ``expected``, of which the graph may not know all buffers."""
    results = graph.on_ranks(request.asked, request.for_graphs).run(graph.step)
    if not request.options.get("grad_sync", True):
        grads, of_inputs = (_summed(kind) for kind in zip(*((x.grads, x.input_grads) for x in results), strict=True))
        results = [replace(each, grads=grads, input_grads=of_inputs) for each in results]
    known = {name: x for name, x in expected.buffers.items() if name in results[0].buffers}
    return [_compared(request, replace(expected, buffers=known), each) for each in results]


def _summed(terms: Sequence[Tensors]) -> Tensors:
    return {name: sum(each[name] for each in terms) for name in terms[0]}


def _compared(request: _Request, expected: Result, got: Result) -> list[Difference]:
    if request.options.get("outputs") == "loss":  # others are not returned
        expected = replace(expected, outputs={name: x for name, x in expected.outputs.items() if name in got.outputs})
    return [*differences(expected, got)]


def _first(request: _Request, bound: float, in_double: bool, found: tuple[Compared, ...]) -> str:
    reference = one_device(request.trial)
    return first_difference(reference, request.asked, request.for_graphs, bound, in_double, found)
