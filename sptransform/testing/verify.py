"""``verify``: does this model, under this strategy, give on N ranks what it gives on one device?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor, nn

from sptransform.compiler.options import Options
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.strategies.names import StrategyLike
from sptransform.testing.comparison import Comparison, Setting
from sptransform.testing.pretended import Asked
from sptransform.testing.rounding import ROUNDINGS, TOLERANCE_IN_DOUBLE
from sptransform.testing.trial import Trial
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
    computes in fewer bits. The model is copied, to the CPU if it is elsewhere, and stays as it is: parameters,
    gradients, buffers, mode, and the generators of random numbers.

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
    asked = _checked(strategy, world_size, processes, rtol, timeout, options)
    comparison = Comparison(trial, asked, processes, timeout, options)
    setting, found = comparison.compare()
    compared = over_ranks(found)
    in_double = setting.narrow is not None and rtol is None
    if rtol is not None:
        setting = replace(setting, bound=float(rtol), why="rtol")
    elif in_double and not _ok(compared, setting) and options.get("fullgraph", True):
        setting, compared = _judged_in_double(comparison, setting, compared)
    ok = _ok(compared, setting)
    first = None if ok else comparison.first_difference(setting.bound, in_double, compared)
    return Verdict(
        ok, str(asked.strategy), world_size, processes, setting.bound, setting.why, compared, first, setting.dtype,
        setting.mode, setting.loss, setting.notes, setting.reason,
    )  # fmt: skip


def _ok(compared: tuple[Compared, ...], setting: Setting) -> bool:
    return all(each.error <= setting.bound for each in compared)


def _judged_in_double(
    comparison: Comparison, setting: Setting, compared: tuple[Compared, ...]
) -> tuple[Setting, tuple[Compared, ...]]:
    """Whether differences are rounding: then they are not there where everything is float64.

    That is seen on simulated ranks. So a difference counts as one of the rewritten graph only if simulated ranks have
    one about as large, and if they compare that tensor.
    """
    as_it_is, found = comparison.in_double()
    largest, of_simulated = (max(each.error for each in some) for some in (compared, over_ranks(as_it_is)))
    doubled = over_ranks(found)
    beyond = {(each.kind, each.name) for each in compared if not each.error <= setting.bound}
    if not largest <= ROUNDINGS * of_simulated or not beyond <= {(each.kind, each.name) for each in doubled}:
        return setting, compared
    why = (
        f"it computes in {setting.narrow}, and differs by up to {largest:.1e} as it is. Compared here with all of that "
        "in float64, on simulated ranks, where rounding is smaller and a mistake is not"
    )
    return replace(setting, bound=TOLERANCE_IN_DOUBLE, why=why), doubled


def _checked(
    strategy: StrategyLike,
    world_size: int | tuple[int, ...],
    processes: bool,
    rtol: float | None,
    timeout: float,
    options: dict[str, Any],
) -> Asked:
    """Raises UsageError for a wrong argument, before anything is run."""
    known = {name: value for name, value in options.items() if name != "fullgraph"}
    chosen = Options.of({**known, "strategy": strategy})
    shape = world_size if isinstance(world_size, tuple) else (world_size,)
    if not all(isinstance(n, int) for n in shape) or prod(shape) < 2:
        what = "verify compares several ranks with one device"
        raise UsageError(describe(what, found=f"world_size={world_size!r}", fix="world_size=2 or more"))
    chosen.strategy.pretended_mesh(world_size)
    for name, value in (("timeout", timeout), ("rtol", rtol)):
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise UsageError(describe(f"{name} is a positive number", found=repr(value), fix=f"{name}=1e-6"))
    if chosen.mesh is not None:
        fix = "world_size=2, or a tuple with the size of each mesh dim"
        raise UsageError(describe("verify makes the mesh itself", found="mesh=", fix=fix))
    if chosen.outputs == "local":
        fix = "outputs='dtensor' or 'full', which hold the same"
        raise UsageError(describe("parts of outputs are not compared", found="outputs='local'", fix=fix))
    for name in () if processes else ("backend", "fullgraph", "shard_parameters"):
        if (value := options.get(name)) is not None and value is not (name == "fullgraph"):
            what = f"simulated ranks have no {name}"
            raise UsageError(describe(what, found=f"{name}={value!r}", fix="processes=True"))
    return Asked(world_size, chosen.strategy)
