"""``parallelize``: compile a module in place, sequence-parallel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh

from sptransform.backend import sptransform_backend
from sptransform.errors import SPTransformError, UsageError, describe
from sptransform.mesh import Mesh
from sptransform.options import Options
from sptransform.strategies import Strategy

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def parallelize(
    model: ModuleT,
    strategy: str | Strategy,
    *,
    mesh: DeviceMesh | None = None,
    backend: str = "inductor",
    outputs: str = "dtensor",
    grad_sync: bool = True,
    strict: bool = False,
    sequence_dims: Mapping[str, int] | None = None,
    fullgraph: bool = True,
) -> ModuleT:
    """Split the sequence of ``model`` over the ranks of ``mesh``; loss and gradients stay those of one device.

    The module is compiled in place (``nn.Module.compile``) and returned: its class, parameter names, ``state_dict``
    and pickling do not change. Call it on every rank with the same full-length inputs.

    Args:
        model: any module ``torch.compile`` captures; nothing in it is rewritten.
        strategy: "ulysses" or a :class:`Strategy` object.
        mesh: one-dimensional DeviceMesh; by default all ranks of the default process group.
        backend: inner ``torch.compile`` backend that compiles the rewritten graph.
        outputs: how outputs that keep a sharded sequence come back: "dtensor" (``.full_tensor()`` gathers), "full"
            (gathered in the graph), "local" (this rank's part). Others, the loss among them, are plain tensors, equal
            on all ranks.
        grad_sync: True: ``.grad`` of every parameter is complete on every rank. False: ``.grad`` is this rank's term
            of a sum over the ranks, for whoever reduces it.
        strict: raise for an op without a sharding rule instead of running it replicated on gathered operands.
        sequence_dims: input name -> its sequence dim, for graphs without attention to tell it.
        fullgraph: as in ``torch.compile``: a graph break is an error.

    Raises:
        UsageError: an argument is wrong; the module is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            describe("parallelize takes an nn.Module", found=type(model).__name__, fix="pass the model itself")
        )
    options = Options(
        strategy=strategy,
        mesh=mesh,
        backend=backend,
        outputs=outputs,
        grad_sync=grad_sync,
        strict=strict,
        sequence_dims=dict(sequence_dims or {}),
    )
    Mesh.of(mesh)  # a wrong mesh is an error here, not at the first call
    model.compile(backend=partial(sptransform_backend, options), fullgraph=fullgraph)
    # nn.Module calls this attribute when it is compiled; there is no public way to call it under a configuration
    model._compiled_call_impl = configured(model._compiled_call_impl)
    return model


def configured(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` under the Dynamo configuration that captures whole models; our errors come as they were raised."""

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return in_configuration(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, SPTransformError):
                raise error.inner_exception from None
            raise

    def in_configuration(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(
            # a logger's warning would break the graph; what is logged while tracing is not the model
            ignore_logging_functions=torch._dynamo.config.ignore_logging_functions | _logging_functions(),
            # DDP would split the graph by gradient bucket, and half an attention cannot be sharded
            optimize_ddp=False,
        ):
            return call(*args, **kwargs)

    return run


def _logging_functions() -> set[Any]:
    """Every logging function of ``logging.Logger``, those that libraries added to it too (``warning_once``)."""
    quiet = {"debug", "info", "warning", "error", "critical", "exception", "log", "warn"}
    added = set(vars(logging.Logger)) - set(_STANDARD)
    return {getattr(logging.Logger, name) for name in (quiet & set(vars(logging.Logger))) | added}


_STANDARD = frozenset(
    name for name, fn in vars(logging.Logger).items() if getattr(fn, "__module__", "logging") == "logging"
)
