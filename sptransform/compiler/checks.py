"""Checks of a call before it is compiled: its devices, its parameters, the names in ``sequence_dims``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

# Private: whether DDP would split the graph; DDP itself knows whether it is running.
from torch._dynamo.utils import get_optimize_ddp_mode
from torch.distributed.tensor import DTensor

from sptransform.compiler.options import Options
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.graph import dataflow, notes
from sptransform.parameters.parts import stored_in
from sptransform.sharding.mesh import Mesh


def check_not_split_by_ddp() -> None:
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


def check_devices(inputs: Sequence[Any], mesh: Mesh) -> None:
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


def check_parameters(inputs: Sequence[Any], options: Options, mesh: Mesh) -> None:
    """Check that sharded parameters are on the ranks of ``mesh``, and that gradients of DTensors are complete."""
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


def check_sequence_dims(graph: fx.Graph, sequence_dims: Mapping[str, int], full_model: bool) -> None:
    """Check names and dims against the inputs. Unless ``full_model``, another part may have missing names."""
    nodes = [node for node in graph.nodes if node.op == "placeholder" and dataflow.is_tensor(node)]
    dims_of = {notes.note(node).input_name: len(dataflow.shape(node)) for node in nodes}
    for name, dim in sequence_dims.items():
        if name in dims_of and not -dims_of[name] <= dim < dims_of[name]:
            raise UsageError(
                describe(
                    f"sequence_dims names a dim that {name!r} does not have",
                    found=f"dim {dim}, {name!r} has {dims_of[name]} dims",
                    fix=f"a dim from 0 to {dims_of[name] - 1}",
                )
            )
        if name not in dims_of and full_model:
            inputs = [known for known in dims_of if known is not None and "." not in known]
            raise UsageError(
                describe(
                    "sequence_dims names an input that the model does not have",
                    found=repr(name),
                    fix=f"one of {', '.join(map(repr, inputs))}",
                )
            )
