"""The torch.compile backend: capture, rewrite, call the inner backend, wrap the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

# Private: the registry behind torch.compile(backend="name"); the only way to call an inner backend by its name.
from torch._dynamo.backends.registry import lookup_backend

from sptransform.agreement.agreement import Agreement
from sptransform.agreement.program import Line, Program, captured_lines, lengths_at, placement_lines, schedule_lines
from sptransform.agreement.replicas import Replicas, WholeParameters
from sptransform.compiler.caches import custom_code, package_version, recompute_tags
from sptransform.compiler.calls_behind import CallsBehind
from sptransform.compiler.checks import check_devices, check_not_split_by_ddp, check_parameters
from sptransform.compiler.custom import identified
from sptransform.compiler.dtensor_boundary import local_input, of_local_parts, with_dtensors
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph, settled
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.context import Context
from sptransform.sharding.mesh import Mesh


def sptransform_backend(
    options: Options,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    full_model: bool = False,
    whole: WholeParameters | None = None,
) -> Callable[..., Any]:
    """Compile Dynamo's ``gm`` for this rank; ``full_model``: it is the whole model, not a part after a graph break.

    ``whole``: what the parameters were of which ranks keep parts.

    If this fails, the other ranks are notified, see :mod:`sptransform.agreement.agreement`.
    """
    mesh = options.strategy.mesh_of(options.mesh)
    if mesh.size == 1:
        return lookup_backend(options.backend)(gm, list(inputs))
    agreement = Agreement.of(mesh)
    with nullcontext() if agreement is None else agreement.telling_failure():
        options = settled(options, mesh, gm, list(inputs))
        mesh = options.strategy.mesh_of(options.mesh)
        compiled, program, lengths, context, replicas = _compile(options, gm, inputs, mesh, full_model)
    if agreement is not None:
        replicas.whole = whole
        compiled = agreement.checked(compiled, program, lengths, options.check_timeout, replicas)
    if options.outputs != "dtensor":
        return compiled
    return CallsBehind(options, context).behind(with_dtensors(compiled, context))


def _compile(
    options: Options, gm: fx.GraphModule, inputs: Sequence[Any], mesh: Mesh, full_model: bool
) -> tuple[Callable[..., Any], Program, list[tuple[int, int]], Context, Replicas]:
    check_not_split_by_ddp()
    check_devices(inputs, mesh)
    check_parameters(inputs, options, mesh)
    lines: list[Line] = []
    lengths: list[tuple[int, int]] = []
    uneven: Context | None = None
    replicas: Replicas

    def see(graph: fx.Graph, part: Context | None) -> None:
        nonlocal uneven, replicas
        if part is None:
            replicas = Replicas(graph, options.check_replicas)
            lines[:], lengths[:], uneven = captured_lines(graph), lengths_at(graph), None
        elif uneven is None:
            lines.extend(schedule_lines(graph, part.mesh))
            uneven = None if part.result.is_even else part
        else:  # after uneven shares groups of this dim may differ, except in what they send each other
            lines.extend(placement_lines(graph, uneven.mesh))

    rewritten, context = rewrite_graph(gm, inputs, options, mesh, see, full_model)
    program = Program((*settings(options, mesh, package_version()), *lines))
    # with uneven shares, graphs may be equal and local sizes not: the cache key names the rank
    share = "" if all(part.result.is_even for part in context.result.mesh_dims) else f"-{mesh.rank}/{mesh.size}"
    tags = share, recompute_tags(rewritten.graph), custom_code(options)
    tag = f"sptransform-{package_version()}{''.join(tags)}"
    with torch.compiler.config.patch(cache_key_tag=torch.compiler.config.cache_key_tag + tag):
        compiled = lookup_backend(options.backend)(rewritten, [local_input(x, rewritten) for x in inputs])
    return of_local_parts(compiled, inputs), program, lengths, context, replicas


def sptransform(gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Any:
    """Entry point of ``torch.compile(model, backend="sptransform", options={...})``."""
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


def settings(options: Options, mesh: Mesh, version: str) -> list[Line]:
    """Versions, and the options that change what runs."""
    found = {
        "sptransform": version,
        "torch": torch.__version__,
        "strategy": identified(options.strategy),
        "ranks": " x ".join(map(str, mesh.shape)),
        "inner backend": options.backend,
        "outputs": options.outputs,
        "grad_sync": options.grad_sync,
        "loss_chunk": options.loss_chunk,
        "check_replicas": options.check_replicas,
        "sequence_dims": dict(sorted(options.sequence_dims.items())),
        **options.custom,
    }
    return [Line(f"{name}: {value}") for name, value in found.items()]
