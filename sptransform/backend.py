"""The torch.compile backend: capture, rewrite, hand to the inner backend, dress the outputs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

# Private: the registry behind torch.compile(backend="name"); the only way to call an inner backend by its name.
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DTensorShard

import sptransform.ops
from sptransform.capture import capture, fix_sizes
from sptransform.mesh import Mesh
from sptransform.op_rules import DEFAULT_RULES
from sptransform.options import Options
from sptransform.pass_manager import Context, run_passes
from sptransform.passes import PIPELINE
from sptransform.placement import Placement, Shard
from sptransform.sizes import SymbolicSizeError

log = logging.getLogger(__name__)


def sptransform_backend(options: Options, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile Dynamo's ``gm`` for this rank."""
    mesh = Mesh.of(options.mesh)
    inner = lookup_backend(options.backend)
    if mesh.size == 1:
        return inner(gm, list(inputs))
    rewritten, context = rewrite_graph(gm, inputs, options, mesh)
    with torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag}sptransform-{_version()}"):
        compiled = inner(rewritten, list(inputs))
    if options.outputs != "dtensor":
        return compiled
    return _with_dtensors(compiled, context)


def rewrite_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, mesh: Mesh
) -> tuple[fx.GraphModule, Context]:
    """Capture ``gm`` and run the pipeline on it; returns the rewritten graph and what the passes found.

    Lengths Dynamo left symbolic stay so where every rank gets an equal share whatever they are; where something needs
    the number itself, they are fixed to it.
    """
    try:
        fix_sizes(gm, mesh.size)
        return _rewrite_graph(gm, inputs, options, mesh)
    except SymbolicSizeError as error:
        log.info("compiling for one length: %s", error)
        fix_sizes(gm, None)
        return _rewrite_graph(gm, inputs, options, mesh)


def _rewrite_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, mesh: Mesh
) -> tuple[fx.GraphModule, Context]:
    context = Context(
        mesh=mesh,
        strategy=options.strategy,
        rules=DEFAULT_RULES,
        outputs=options.outputs,
        grad_sync=options.grad_sync,
        strict=options.strict,
        sequence_dims=options.sequence_dims,
    )
    rewritten = run_passes(capture(gm, inputs), PIPELINE, context)
    for fallback in context.fallbacks:
        log.warning(
            "%s has no sharding rule and runs replicated (%d bytes gathered) at %s",
            fallback.op,
            fallback.gathered_bytes,
            fallback.source,
        )
    return rewritten, context


def sptransform(gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Any:
    """Entry point of ``torch.compile(model, backend="sptransform", options={...})``."""
    return sptransform_backend(Options.of(options or {}), gm, inputs)


def _with_dtensors(compiled: Callable[..., Any], context: Context) -> Callable[..., Any]:
    """Return sharded outputs as DTensors: ``full_tensor()`` gathers, nothing gathers behind the user's back."""

    def wrap(x: Any, placement: Placement | None) -> Any:
        if not isinstance(placement, Shard):
            return x
        # an even partition may be of any length; what the call had is what the part says
        whole = x.shape[placement.dim] * context.mesh.size if placement.partition.is_even else placement.dim_size
        shape = torch.Size([*x.shape[: placement.dim], whole, *x.shape[placement.dim + 1 :]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            x, context.mesh.device_mesh, [DTensorShard(placement.dim)], run_check=False, shape=shape, stride=stride
        )

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        return tuple(map(wrap, outputs, context.output_placements))

    return run


@cache
def _version() -> str:
    """Hash of the package's files: compile caches must not serve a backward of another version."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


