"""``compare``: strategies side by side for one model. Needs no processes and no devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import fx, nn

from sptransform.compiler.fake_models import without_meta
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import arguments_of, no_garbage_collection, rewritten_for, while_captured
from sptransform.compiler.trials import trials
from sptransform.cost.folding import LayerRun, fold_layers
from sptransform.cost.hardware import Hardware, hardware_of
from sptransform.cost.read import step_of
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.pass_manager import run_passes
from sptransform.inspection.attended_work import checked_documents
from sptransform.planning.beside import Beside
from sptransform.planning.candidates import OF_SEQUENCES, OF_WEIGHTS, candidates
from sptransform.planning.comparison import Comparison
from sptransform.planning.judged import Trial, judged, quietly, ranked
from sptransform.planning.records import Option
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.names import StrategyLike
from sptransform.strategies.ulysses import Ulysses

Progress = Callable[[str, int, int], None]
T = TypeVar("T")


@no_garbage_collection()
def compare(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    world_size: int,
    hardware: str | Path | Hardware | None = None,
    strategies: Sequence[StrategyLike] | None = None,
    documents: Sequence[int] | Sequence[Sequence[int]] | None = None,
    progress: Progress = lambda name, done, of: None,
    **options: Any,
) -> Comparison:
    """Return what every strategy would send, compute and hold in one training step of ``model``, side by side.

    ``print`` it, ``rich.print`` it, or take ``to_dict()``. The model is captured once, and neither run nor changed; it
    may live on ``meta``. Where ranks differ, as where something does not divide, the busiest one is shown.

    Args:
        model: the unmodified module.
        inputs: keyword arguments (a mapping) or positional ones (a tuple) of the model's forward.
        world_size: the number of ranks.
        hardware: the name of a known machine, the path of a file with another, or a :class:`Hardware`: a step's time is
            then simulated. Without it, strategies are ranked by the bytes that they send.
        strategies: as for :func:`sptransform.parallelize`; pairs and USP are shown on every mesh of ``world_size``
            ranks. Default: every strategy of this library, and those of sequences with tensor parallelism.
        documents: as for :func:`sptransform.explain`.
        progress: called with the name of each strategy, how many are done, and of how many.
        options: further options of :func:`sptransform.parallelize`.

    Raises:
        UsageError: an argument is wrong.
        CaptureError: the model cannot be captured.
    """
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 2:
        fix = "2 or more: one rank sends nothing, under any strategy"
        raise UsageError(describe("compare takes a number of ranks", found=f"world_size={world_size!r}", fix=fix))
    if not isinstance(model, nn.Module):
        found_type = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UsageError(describe("compare takes an nn.Module", found=found_type, fix="the model itself"))
    if not isinstance(inputs, Mapping | tuple):
        fix = "(x,), or {'x': x}"
        raise UsageError(describe("inputs are the arguments of a call", found=type(inputs).__name__, fix=fix))
    if given := {"strategy", "mesh"} & options.keys():
        fix = "strategies=[..]" if "strategy" in given else "world_size="
        what = "compare makes strategies and meshes itself"
        raise UsageError(describe(what, found=", ".join(f"{name}=" for name in sorted(given)), fix=fix))
    found = candidates((world_size,), (*OF_SEQUENCES, *OF_WEIGHTS) if strategies is None else strategies)
    if not found:
        what = f"none of these strategies takes {world_size} ranks"
        fix = "others, or a number of ranks that is a product of two: pairs and USP have a mesh of two dims"
        raise UsageError(describe(what, found=f"strategies={strategies!r}", fix=fix))
    Mesh.pretended(world_size)  # refuses too many ranks
    machine, lengths = None if hardware is None else hardware_of(hardware), checked_documents(documents)
    chosen = Options.of({"outputs": "dtensor", **options})

    def use(trial: Trial, runs: Mapping[str, LayerRun]) -> Comparison:
        begun = []
        with Beside() as beside:
            for done, candidate in enumerate(found):
                progress(candidate.name, done, len(found))
                begun.append(judged(candidate, trial, machine, runs, lengths, beside.call))
            alone = trial(Ulysses(), (1,), 0)
            run_passes(alone.graph_module, chosen.pipeline.normalize, alone.context)  # which read masks
            one_device = step_of(alone, runs=runs)
            shown = [option() for option in begun]
        return Comparison(
            world_size=world_size,
            hardware=None if machine is None else machine.name,
            options=ranked(_with_lines(shown)),
            one_device=one_device,
            copies={path: run.times for path, run in runs.items()},
        )

    return while_tried(model, inputs, chosen, use)


def while_tried(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    options: Options,
    use: Callable[[Trial, Mapping[str, LayerRun]], T],
) -> T:
    """What ``use`` makes of the model, captured once: of what rewrites it for any strategy and ranks, and its runs.

    The runs of equal layers are those of :func:`sptransform.cost.folding.fold_layers`.
    """
    model, inputs = without_meta(model, inputs)
    args, kwargs = arguments_of(inputs)

    def found(gm: fx.GraphModule, example_inputs: list[Any]) -> T:
        folded = fold_layers(gm, example_inputs)
        rewrite = partial(rewritten_for, apart=folded.runs)
        with quietly():
            return use(trials(rewrite, folded.graph_module, folded.inputs, options, Mesh.pretended(1)), folded.runs)

    return while_captured(model, found, *args, **kwargs)


def _with_lines(options: Sequence[Option]) -> Iterator[Option]:
    """Where an error of all attentions names none, it gets the line of the first."""
    attentions = (work for option in options if option.explanation for work in option.explanation.attention)
    line = next((work.source_line for work in attentions), None)
    for option in options:
        if option.blocked is not None and line is not None and "\n  in: " not in option.blocked:
            yield replace(option, blocked=f"{option.blocked}\n  in: {line}")
        else:
            yield option
