"""``Auto``: the strategy that a simulation of every other finds best for the graph at hand."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from sptransform.capture.lengths import has_symbolic_sizes
from sptransform.compiler.rewrite import no_garbage_collection
from sptransform.cost.folding import LayerRun, fold_layers
from sptransform.cost.hardware import Hardware, HardwareLike, hardware_names, hardware_of
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Strategy
from sptransform.ops.groups import group_called
from sptransform.planning.candidates import OF_SEQUENCES, OF_WEIGHTS, candidates
from sptransform.planning.crossing import crossing
from sptransform.planning.judged import Trial, judged, quietly, ranked
from sptransform.planning.records import Option
from sptransform.planning.units import seconds, size
from sptransform.sharding.mesh import Mesh

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What :class:`Auto` chose for one graph.

    Attributes:
        chosen: the option that is taken.
        options: all that were considered, the best first; then those that do not fit the memory, or are blocked.
        reason: why, in words.
    """

    chosen: Option
    options: tuple[Option, ...]
    reason: str


@dataclass(frozen=True)
class Auto(Strategy):
    """The strategy whose simulated step is fastest, of those that fit heads, mesh and memory.

    Each graph is rewritten under every strategy when it is compiled; nothing is measured. On a mesh of one dim these
    are Ulysses, Ring, AllGatherKV and every USP, on a mesh of two dims the USP of that shape. All ranks choose alike.
    Without hardware that is known, as on CPUs, the one that sends the fewest bytes is taken. ``reason`` says why, as
    does the log.

    Args:
        hardware: a name, a file or an object, as for :func:`sptransform.compare`. None: the GPU that all ranks have.
        memory: bytes that a rank may hold for parameters, gradients, activations and inputs. None: as many as
            the hardware has, and without it any number.
        megatron: consider tensor parallelism too, alone, and on a mesh of two dims as the second of a pair. It cuts
            parameters before the first call, so :func:`sptransform.parallelize` then needs ``inputs``.

    Raises:
        UsageError: an invalid argument; at compile time, if no strategy can run the model.
    """

    hardware: HardwareLike | None = None
    memory: int | None = None
    megatron: bool = False
    choices: list[Choice] = field(default_factory=list, init=False, repr=False, compare=False)
    chooses = True
    max_mesh_dims = 2

    def __post_init__(self) -> None:
        if self.hardware is not None:
            object.__setattr__(self, "hardware", hardware_of(self.hardware))
        is_number = isinstance(self.memory, int | float) and not isinstance(self.memory, bool) and self.memory > 0
        if self.memory is not None and not is_number:
            raise UsageError(describe("memory of Auto is a number of bytes", found=repr(self.memory), fix="80e9"))
        if not isinstance(self.megatron, bool):
            raise UsageError(describe("megatron of Auto is a bool", found=repr(self.megatron), fix="True or False"))

    def __repr__(self) -> str:
        name = None if self.hardware is None else hardware_of(self.hardware).name
        return f"Auto(hardware={name!r}, memory={self.memory}, megatron={self.megatron})"

    @property
    def shards_weights(self) -> bool:  # type: ignore[override]
        return self.megatron

    @property
    def reason(self) -> str:  # type: ignore[override]
        """Why the last graph got its strategy; empty before there was one."""
        return self.choices[-1].reason if self.choices else ""

    def mesh_of(self, device_mesh: DeviceMesh | None) -> Mesh:
        mesh = super().mesh_of(device_mesh)
        _device_of_all(mesh)  # where every rank takes part, also one that was given hardware
        return mesh

    def mesh_shapes(self, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        grids = ((c.strategy.ring, c.strategy.ulysses) for c in candidates(shape, ("usp",)))
        return [] if len(shape) == 2 else [grid for grid in grids if 1 not in grid]

    @no_garbage_collection()
    def choose(
        self,
        gm: fx.GraphModule,
        inputs: list[Any],
        trials: Callable[[fx.GraphModule, list[Any], Collection[str]], Trial],
        mesh: Mesh,
        in_parts: bool,
    ) -> Strategy:
        runs: Mapping[str, LayerRun] = {}
        if not has_symbolic_sizes(gm):
            folded = fold_layers(gm, inputs)
            gm, inputs, runs = folded.graph_module, folded.inputs, folded.runs
        choice = self.choice_of(trials(gm, inputs, runs), mesh, runs, in_parts)
        self.choices.append(choice)
        log.info("%s", choice.reason)
        strategy = copy(choice.chosen.strategy)
        object.__setattr__(strategy, "reason", choice.reason)
        return strategy

    def choice_of(self, trial: Trial, mesh: Mesh, runs: Mapping[str, LayerRun], in_parts: bool = False) -> Choice:
        """What is chosen of all that ``trial`` rewrites; see :meth:`choose`."""
        hardware = hardware_of(self.hardware) if self.hardware is not None else _hardware_for(mesh)
        considered = [*OF_SEQUENCES, *(OF_WEIGHTS if self.megatron else ())]
        found = [c for c in candidates(mesh.shape, considered) if len(c.shape) == len(mesh.shape)]
        if in_parts:  # parameters are kept over all ranks, not over the two dims of a USP
            found = [c for c in found if c.strategy.max_mesh_dims == 1 or len(c.shape) == 2]
        with quietly():
            options = ranked(judged(candidate, trial, hardware, runs)() for candidate in found)
        choice = self.best_of(options, hardware)
        others = (o for o in choice.options[1:] if o.step is not None and o.strategy.max_mesh_dims == 1)
        where = crossing(trial, choice.chosen, next(others, choice.chosen), runs)
        return replace(choice, reason=f"{choice.reason}; {where}") if where else choice

    def best_of(self, options: Sequence[Option], hardware: Hardware | None) -> Choice:
        """The first of ``options``, the best first, that fits the memory; without one, the smallest.

        Raises:
            UsageError: all are blocked.
        """
        running = [option for option in options if option.step is not None]
        if not running:
            why = "\n".join(f"    {option.name}: {option.blocked}" for option in options)
            raise UsageError(describe("no strategy can run this model", found=f"\n{why}", fix="what one of them says"))
        limit = self.memory if self.memory is not None or hardware is None else hardware["memory.bytes"]
        fitting = [option for option in running if limit is None or option.peak_bytes <= limit]
        order = fitting or sorted(running, key=lambda option: option.peak_bytes)
        if not fitting:
            log.warning("no strategy fits %s: the smallest needs %s", size(limit), size(order[0].peak_bytes))
        others = [option for option in options if option not in order]
        reason = _reason(order, [o for o in others if o.step is not None], hardware, limit, bool(fitting))
        return Choice(order[0], (*order, *others), reason)


def _reason(
    order: Sequence[Option], too_large: Sequence[Option], hardware: Hardware | None, limit: float | None, fits: bool
) -> str:
    chosen = order[0]
    if not fits:
        words = [f"{chosen.name}, which needs the least memory, {size(chosen.peak_bytes)}: none fits {size(limit)}"]
    elif hardware is None:
        words = [f"{chosen.name}, which sends the least, {_sent(chosen)} a step: no hardware is known, so bytes decide"]
    else:
        words = [f"{chosen.name}, the fastest by simulation on {hardware.name}, {_time(chosen)} a step"]
    if len(order) > 1:
        by = _sent(order[1]) if hardware is None else _time(order[1])
        words.append(f"next is {order[1].name}, {size(order[1].peak_bytes) if not fits else by}")
    if fits and too_large:
        words.append(f"too large for {size(limit)}: {', '.join(option.name for option in too_large)}")
    return f"auto takes {'; '.join(words)}"


def _time(option: Option) -> str:
    return seconds(option.timeline.seconds)


def _sent(option: Option) -> str:
    return size(option.step.bytes_sent())


def _hardware_for(mesh: Mesh) -> Hardware | None:
    """The hardware of the ranks of a real mesh, if it is known; None for a pretended one."""
    device = _device_of_all(mesh)
    return None if device is None else hardware_of_device(device, mesh.size)


def hardware_of_device(device: str, num_ranks: int) -> Hardware | None:
    """The first file whose device has this name, as CUDA gives it, and whose links reach so many ranks."""
    words = re.split(r"\W", device.lower())
    files = [file for file in hardware_names() if file.split("-")[0] in words]
    on_pcie = [file for file in files if file.endswith("-pcie")]
    of_links = on_pcie if "pcie" in words else [file for file in files if file not in on_pcie] or on_pcie
    reaching = (hardware_of(file) for file in of_links)
    return next((x for x in reaching if num_ranks <= x["node.ranks"] or x.get("between.bandwidth")), None)


_devices: dict[str, str | None] = {}


def _device_of_all(mesh: Mesh) -> str | None:
    """The name of the GPU that every rank of a real mesh has; None if they differ, or have none. Asked once a group."""
    if mesh.device_mesh is None or mesh.device_mesh.device_type != "cuda":
        return None
    if mesh.group not in _devices:
        names: list[str | None] = [None] * mesh.size
        dist.all_gather_object(names, torch.cuda.get_device_name(), group_called(mesh.group))
        _devices[mesh.group] = names[0] if len(set(names)) == 1 else None
    return _devices[mesh.group]
