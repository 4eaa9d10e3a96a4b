"""The torch.compile backend: capture, rewrite, hand to the inner backend, dress the outputs."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

# Private: the registry behind torch.compile(backend="name"); the only way to call an inner backend by its name.
from torch._dynamo.backends.registry import lookup_backend

# Private: whether DDP would split the graph; DDP itself knows whether it is running.
from torch._dynamo.utils import get_optimize_ddp_mode
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as DTensorShard

import sptransform.ops
from sptransform import annotations
from sptransform.agreement import Agreement
from sptransform.capture import capture, fix_sizes, has_symbolic_sizes
from sptransform.errors import UsageError, describe
from sptransform.fingerprint import Line, Program, captured_lines, lengths_at, placement_lines, schedule_lines, settings
from sptransform.mesh import Mesh
from sptransform.op_rules import DEFAULT_RULES
from sptransform.options import Options, check_torch_version
from sptransform.parameters import stored_in
from sptransform.pass_manager import Context
from sptransform.placement import Placement, Shard
from sptransform.sizes import needs_number
from sptransform.stages import distribute
from sptransform.trace import traced

log = logging.getLogger(__name__)


def sptransform_backend(
    options: Options, gm: fx.GraphModule, inputs: Sequence[Any], *, whole: bool = False
) -> Callable[..., Any]:
    """Compile Dynamo's ``gm`` for this rank; ``whole``: it is the whole model, not a part after a graph break.

    Where this fails the other ranks are told, see :mod:`sptransform.agreement`.
    """
    mesh = options.strategy.mesh_of(options.mesh)
    if mesh.size == 1:
        return lookup_backend(options.backend)(gm, list(inputs))
    agreement = Agreement.of(mesh)
    with nullcontext() if agreement is None else agreement.telling_failure():
        compiled, program, lengths, context = _compile(options, gm, inputs, mesh, whole)
    if agreement is not None:
        compiled = agreement.checked(compiled, program, lengths, options.check_timeout)
    if options.outputs != "dtensor":
        return compiled
    return _with_dtensors(compiled, context)


def _compile(
    options: Options, gm: fx.GraphModule, inputs: Sequence[Any], mesh: Mesh, whole: bool
) -> tuple[Callable[..., Any], Program, list[tuple[int, int]], Context]:
    _check_not_split_by_ddp()
    _check_devices(inputs, mesh)
    _check_parameters(inputs, options, mesh)
    lines: list[Line] = []
    lengths: list[tuple[int, int]] = []
    uneven: Context | None = None

    def see(graph: fx.Graph, part: Context | None) -> None:
        nonlocal uneven
        if part is None:
            lines[:], lengths[:], uneven = captured_lines(graph), lengths_at(graph), None
        elif uneven is None:
            lines.extend(schedule_lines(graph, part.mesh))
            uneven = None if part.is_even else part
        else:  # what a group of this mesh dim does is its own, but for where groups meet
            lines.extend(placement_lines(graph, uneven.mesh))

    rewritten, context = rewrite_graph(gm, inputs, options, mesh, see, whole)
    program = Program((*settings(options, mesh, _version()), *lines))
    # local sizes of uneven shares may stand nowhere in the graph: they are the rank's own
    share = "" if all(part.is_even for part in context.parts) else f"-{mesh.rank}/{mesh.size}"
    tag = f"sptransform-{_version()}{share}{_recompute_tags(rewritten.graph)}"
    with torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag + tag):
        compiled = lookup_backend(options.backend)(rewritten, [_local(x, rewritten) for x in inputs])
    return _of_local_parts(compiled, inputs), program, lengths, context


def _local(x: Any, gm: fx.GraphModule) -> Any:
    """What the inner backend is to see of an input: of one that ranks share a fake of this rank's part."""
    if not isinstance(x, DTensor):
        return x
    mode = annotations.fake_mode(gm.graph)
    return mode.from_tensor(x.detach().to_local(), static_shapes=True).requires_grad_(x.requires_grad)


def _of_local_parts(compiled: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """``compiled``, called with DTensors; they are opened outside of it, so that their gradients are DTensors too."""
    places = [index for index, x in enumerate(inputs) if isinstance(x, DTensor)]
    if not places:
        return compiled

    def run(*args: Any) -> Any:
        local = list(args)
        for index in places:
            local[index] = args[index].to_local()
        return compiled(*local)

    return run


def rewrite_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    mesh: Mesh,
    see: Callable[[fx.Graph, Context | None], None] = lambda graph, part: None,
    whole: bool = True,
    shard_parameters: bool = False,
) -> tuple[fx.GraphModule, Context]:
    """Capture ``gm`` and run the pipeline on it; returns the rewritten graph and what the passes found.

    Lengths Dynamo left symbolic stay so where every rank gets an equal share whatever they are; where something needs
    the number itself, they are fixed to it. ``see`` is shown the captured graph before it changes, and what each mesh
    dim makes of it, with that dim's context; ``whole``: ``gm`` is the whole model; ``shard_parameters``: see
    :class:`Context`.
    """
    try:
        with _no_garbage_collection():
            fix_sizes(gm, options.strategy.multiple(mesh.size))
            return _rewrite_graph(gm, inputs, options, mesh, see, whole, shard_parameters)
    except Exception as error:
        if not (needs_number(error) and has_symbolic_sizes(gm)):
            raise
        log.info("compiling for one length: %s", error)
        fix_sizes(gm, None)
        return _rewrite_graph(gm, inputs, options, mesh, see, whole, shard_parameters)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Graphs are webs of objects that stay alive: looking through them for garbage takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _rewrite_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    mesh: Mesh,
    see: Callable[[fx.Graph, Context | None], None],
    whole: bool,
    shard_parameters: bool,
) -> tuple[fx.GraphModule, Context]:
    context = Context(
        mesh=mesh,
        strategy=options.strategy,
        rules=DEFAULT_RULES,
        outputs=options.outputs,
        grad_sync=options.grad_sync,
        strict=options.strict,
        shard_parameters=shard_parameters,
        sequence_dims=options.sequence_dims,
    )
    captured = capture(gm, inputs)
    _check_sequence_dims(captured.graph, options.sequence_dims, whole)
    see(captured.graph, None)
    with traced(captured.graph, context):
        distribute(captured, context, see)
    for fallback in context.fallbacks:
        log.warning(
            "%s has no sharding rule and runs replicated (%d bytes gathered) at %s",
            fallback.op,
            fallback.gathered_bytes,
            fallback.source,
        )
    return captured, context


def sptransform(gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Any:
    """Entry point of ``torch.compile(model, backend="sptransform", options={...})``."""
    check_torch_version()
    chosen = Options.of(options or {})
    if chosen.shard_parameters:
        raise UsageError(
            describe(
                "a backend of torch.compile cannot change parameters",
                found="shard_parameters=True",
                fix="sptransform.parallelize(model, strategy, shard_parameters=True)",
            )
        )
    return sptransform_backend(chosen, gm, inputs)


def _check_not_split_by_ddp() -> None:
    if (
        get_optimize_ddp_mode() == "ddp_optimizer"
        and nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None
    ):
        raise UsageError(
            describe(
                "DistributedDataParallel splits the model's graph by gradient bucket",
                found="torch._dynamo.config.optimize_ddp is on; a part of a model does not show its sequence",
                fix="call parallelize on the model before DistributedDataParallel, or set optimize_ddp = False",
            )
        )


def _check_devices(inputs: Sequence[Any], mesh: Mesh) -> None:
    found = {x.device.type for x in inputs if isinstance(x, torch.Tensor)}
    expected = mesh.device_mesh.device_type if mesh.device_mesh is not None else None
    if "meta" in found:
        raise UsageError(
            describe(
                "the model has no weights yet",
                found="parameters, buffers or inputs on meta",
                fix=f"model.to_empty(device={expected!r}), then load or initialise them",
            )
        )
    if expected is not None and found and expected not in found:
        raise UsageError(
            describe(
                "the model runs on other devices than its mesh has",
                found=f"tensors on {', '.join(sorted(found))}, a mesh of {expected}",
                fix=f"move model and inputs to {expected}, or pass a mesh of {', '.join(sorted(found))}",
            )
        )


def _check_parameters(inputs: Sequence[Any], options: Options, mesh: Mesh) -> None:
    """Parameters kept in parts are kept by the ranks of ``mesh``, and the gradients of such are complete."""
    parameters = [x for x in inputs if isinstance(x, DTensor) and isinstance(x, nn.Parameter)]
    sharing = {tuple(x.device_mesh.mesh.flatten().tolist()) for x in parameters if stored_in(x)}
    device_mesh = options.strategy.weights_mesh(mesh).device_mesh
    own = set() if device_mesh is None else {tuple(device_mesh.mesh.flatten().tolist())}
    if not options.grad_sync and any(isinstance(x, DTensor) and x.requires_grad and not stored_in(x) for x in inputs):
        raise UsageError(
            describe(
                "the gradient of a DTensor that every rank has would be a sum that is not taken",
                found="grad_sync=False, an input placed Replicate() that requires a gradient",
                fix="grad_sync=True, or a plain tensor: x.full_tensor()",
            )
        )
    found, fix = None, "leave parameters as they are: parallelize(..., shard_parameters=False)"
    if sharing - own:
        found, fix = "other ranks share them", "parallelize the model over the mesh its parameters are on"
    elif sharing and not options.grad_sync:
        found = "grad_sync=False"
    elif sharing and nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None:
        found = "DistributedDataParallel, which reduces the gradients of plain parameters"
    if found is not None:
        raise UsageError(describe("parameters of which ranks keep parts do not go with this", found=found, fix=fix))


def _check_sequence_dims(graph: fx.Graph, sequence_dims: Mapping[str, int], whole: bool) -> None:
    """Names are those of inputs, dims those inputs have. Another part of a model may have the names this one lacks."""
    nodes = [node for node in graph.nodes if node.op == "placeholder" and annotations.is_tensor(node)]
    dims_of = {annotations.note(node).input_name: len(annotations.shape(node)) for node in nodes}
    for name, dim in sequence_dims.items():
        if name in dims_of and not -dims_of[name] <= dim < dims_of[name]:
            raise UsageError(
                describe(
                    f"sequence_dims names a dim that {name!r} does not have",
                    found=f"dim {dim}, {name!r} has {dims_of[name]} dims",
                    fix=f"a dim from 0 to {dims_of[name] - 1}",
                )
            )
        if name not in dims_of and whole:
            inputs = [known for known in dims_of if known is not None and "." not in known]
            raise UsageError(
                describe(
                    "sequence_dims names an input that the model does not have",
                    found=repr(name),
                    fix=f"one of {', '.join(map(repr, inputs))}",
                )
            )


def _with_dtensors(compiled: Callable[..., Any], context: Context) -> Callable[..., Any]:
    """Return sharded outputs as DTensors: ``full_tensor()`` gathers, nothing gathers behind the user's back."""

    meshes = [part.mesh for part in context.parts]
    device_mesh = meshes[0].device_mesh if len(meshes) == 1 else context.mesh.grid(*(mesh.size for mesh in meshes))

    def wrap(x: Any, *placements: Placement | None) -> Any:
        if not any(isinstance(placement, Shard) for placement in placements):
            return x
        shape = list(x.shape)
        for placement, mesh in reversed(list(zip(placements, meshes, strict=True))):
            if isinstance(placement, Shard):
                # an even partition may be of any length; what the call had is what the part says
                whole = shape[placement.dim] * mesh.size if placement.partition.is_even else placement.dim_size
                shape[placement.dim] = whole
        stride = torch.empty(shape, device="meta").stride()
        dims = [DTensorShard(p.dim) if isinstance(p, Shard) else Replicate() for p in placements]
        return DTensor.from_local(x, device_mesh, dims, run_check=False, shape=torch.Size(shape), stride=stride)

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        return tuple(map(wrap, outputs, *(part.output_placements for part in context.parts)))

    return run


def _recompute_tags(graph: fx.Graph) -> str:
    """What is recomputed, hashed; "" for nothing. Compile caches see the ops of a graph, not what is said of them."""
    regions: dict[Any, int] = {}  # the numbers of checkpointed regions are the process's, their order is the model's
    tags = [
        (index, node.meta["recompute"].value, regions.setdefault(node.meta.get("ac_graph_id"), len(regions)))
        for index, node in enumerate(graph.nodes)
        if "recompute" in node.meta
    ]
    return f"-{hashlib.sha256(repr(tags).encode()).hexdigest()[:16]}" if tags else ""


@cache
def _version(package: Path = Path(__file__).parent) -> str:
    """Hash of the package's files: compile caches must not serve what another version compiled."""
    digest = hashlib.sha256()
    for file in _sources(package):
        digest.update(f"{file.relative_to(package)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _sources(package: Path) -> list[Path]:
    """Every Python file of the package. ``passes`` is a link in a checkout, which ``Path.rglob`` does not follow."""
    folders = os.walk(package, followlinks=True)
    return sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py"))


