"""``parallelize``: compile a module in place, sequence-parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sptransform.agreement.agreement import Agreement
from sptransform.agreement.replicas import WholeParameters
from sptransform.compiler.backend import sptransform_backend
from sptransform.compiler.dynamo import WatchedCompiler, compiled_by_itself, configured
from sptransform.compiler.options import Options
from sptransform.compiler.parameter_dims import parameter_dims
from sptransform.compiler.rewrite import arguments_of, settled_for_call
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.pass_manager import Pass
from sptransform.frontend.dtensor_inputs import taking_parts
from sptransform.frontend.generation import unsharded_with_cache
from sptransform.parameters.modules import keep_less, keep_parts
from sptransform.parameters.parts import first_dims
from sptransform.rules.rule import RuleFn
from sptransform.rules.table import OpEntry
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.names import StrategyLike

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def parallelize(
    model: ModuleT,
    strategy: StrategyLike,
    *,
    mesh: DeviceMesh | None = None,
    backend: str = "inductor",
    outputs: str | None = None,
    grad_sync: bool = True,
    strict: bool = False,
    shard_parameters: bool = False,
    inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    sequence_dims: Mapping[str, int] | None = None,
    fullgraph: bool = True,
    check_timeout: float = 300.0,
    rules: Mapping[Any, OpEntry | RuleFn] | None = None,
    passes: Sequence[Pass] = (),
    loss_chunk: int | str | None = "auto",
    check_replicas: str = "first",
) -> ModuleT:
    """Split the sequence of ``model`` over the ranks of ``mesh``; loss and gradients stay those of one device.

    The module is compiled in place (``nn.Module.compile``) and returned: its class, parameter names, ``state_dict``
    and pickling do not change. Call it on every rank with the same full-length inputs, or with DTensors over its mesh.

    :class:`MegatronSP` and ``shard_parameters`` keep the names, but parameters become DTensors: each rank keeps a part.
    Modules that own parameters get a subclass of their class with the same name. Make optimizers afterwards. The model
    may then be on ``meta``: ``to_empty`` materialises only what this rank keeps.

    Args:
        model: any module ``torch.compile`` captures; nothing in it is rewritten.
        strategy: "ulysses", "ring", "allgather", "usp", "megatron", or a :class:`Strategy` object. A pair of them, the
            second "megatron", uses one mesh dim each: context and tensor parallelism.
        mesh: DeviceMesh of one dim; of two for a pair of strategies, or optionally for "usp" (ring x ulysses). Default:
            all ranks of the default process group.
        backend: inner ``torch.compile`` backend that compiles the rewritten graph.
        outputs: how sharded outputs are returned: "dtensor" (``.full_tensor()`` gathers), "full" (gathered in the
            graph), "local" (this rank's part). Others, such as the loss, are plain tensors, equal on all ranks.
            "loss": only tensors without a sequence are returned, the others are None and what only they need is not
            computed: best for training, since then logits exist for no more than a chunk (``loss_chunk``).
            Default: "dtensor"; with ``fullgraph=False`` only "full" is possible.
        grad_sync: True: ``.grad`` of every parameter is complete on every rank. False: ``.grad`` is this rank's term
            of a sum over the ranks, which the caller reduces.
        strict: raise for an op without a sharding rule instead of running it replicated on gathered operands.
        shard_parameters: keep 1/N of every parameter on each rank, and of its gradient and optimizer state (ZeRO-3,
            Rajbhandari et al., arXiv 1910.02054, §5.3). In the graph, parameters are gathered before use and
            gradients reduce-scattered.
        inputs: keyword arguments (a mapping) or positional ones (a tuple) of a call; only shapes matter.
            With them, MegatronSP cuts parameters at once. Without, it cuts them at the first call, and each rank holds
            the full parameters until then.
        sequence_dims: input name -> its sequence dim, for graphs in which no attention shows it.
        fullgraph: as in ``torch.compile``: a graph break is an error. False: parts between breaks are sharded
            separately, and pass each other full tensors.
        check_timeout: before each forward and backward, ranks check that all are about to run the same program. This is
            how many seconds a rank waits there for the slowest, compile time included.
        rules: op -> its sharding rule (:func:`sptransform.rule`, or :class:`OpEntry` with a form for shards), for ops
            that have none; before ours, if there is one. Check them with :func:`sptransform.testing.check_rule`.
        passes: :class:`Pass` objects, each of which runs at the place that its ``after`` names.
        loss_chunk: of how many tokens the logits of a cross-entropy exist at a time, forward and backward, where
            nothing else reads them. They are computed twice. "auto": where a rank's logits have 64 MiB or more. None:
            all at once.
        check_replicas: whether ranks hold the same of what all of them should: parameters and buffers at the first call
            of each compiled graph ("first"), at every call ("always"); with both, inputs at every call, and the state
            of the generator where dropout draws from it. Inputs on a GPU are judged a call later. "never": nothing.

    Raises:
        UsageError: an argument is wrong; the module is left as it was.
        RankError: from calls of the model: another rank is gone, late, failed, about to run something else, or holds
            other weights or inputs.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            describe("parallelize takes an nn.Module", found=type(model).__name__, fix="pass the model itself")
        )
    if not isinstance(fullgraph, bool):
        raise UsageError(describe("fullgraph is a bool", found=repr(fullgraph), fix="True or False"))
    options = Options(
        strategy=strategy,
        mesh=mesh,
        backend=backend,
        outputs=("dtensor" if fullgraph else "full") if outputs is None else outputs,
        grad_sync=grad_sync,
        strict=strict,
        shard_parameters=shard_parameters,
        sequence_dims={} if sequence_dims is None else sequence_dims,
        check_timeout=check_timeout,
        rules={} if rules is None else rules,
        passes=passes,
        loss_chunk=loss_chunk,
        check_replicas=check_replicas,
    )
    if not fullgraph and options.outputs != "full":
        raise UsageError(
            describe(
                "after a graph break the model goes on with the outputs of the part before it, so they must be whole",
                found=f"fullgraph=False, outputs={outputs!r}",
                fix="outputs='full', or fullgraph=True",
            )
        )
    where = options.strategy.mesh_of(mesh)  # a wrong mesh is an error here, not at the first call
    if options.strategy.chooses and options.strategy.shards_weights:
        # how parameters are cut has to be known before the first call
        if inputs is None:
            raise UsageError(
                describe(
                    "the choice of a strategy that may cut parameters needs a call of the model",
                    found=f"{options.strategy}, no inputs",
                    fix="parallelize(.., inputs={'input_ids': ids, ..}); Auto(megatron=False) needs none",
                )
            )
        options = settled_for_call(model, options, where, inputs)
        where = options.strategy.mesh_of(mesh)
    if options.keeps_parts and not grad_sync:
        raise UsageError(
            describe(
                "parameters of which ranks keep parts have complete gradients",
                found="grad_sync=False",
                fix="grad_sync=True, or a strategy that leaves parameters whole",
            )
        )
    _check_module(model, where, cuts=options.keeps_parts)
    whole = WholeParameters() if check_replicas != "never" and Agreement.of(where) is not None else None
    cutting = nullcontext if whole is None else partial(whole.cut, model)
    settle = _keep_parts(model, options, where, inputs, cutting) if options.keeps_parts and where.size > 1 else None
    compiler = WatchedCompiler(partial(sptransform_backend, options, full_model=fullgraph, whole=whole))
    model.compile(backend=compiler, fullgraph=fullgraph)
    # nn.Module calls _compiled_call_impl when compiled; there is no public way to call it under a configuration
    compiled = partial(torch.compile, backend=compiler, fullgraph=fullgraph)
    call = configured(taking_parts(model, model._compiled_call_impl, compiled, where.size), compiler.compiles)
    call = _telling(call if settle is None else settle(call), Agreement.of(where))
    if where.size > 1:
        call = unsharded_with_cache(model, compiler.checked(call))
        model.register_forward_pre_hook(compiled_by_itself)
    # an outer torch.compile must not trace into the call: what it inlines would run unsharded
    model._compiled_call_impl = torch.compiler.disable(call)
    return model


def _keep_parts(
    model: nn.Module,
    options: Options,
    mesh: Mesh,
    inputs: Mapping[str, Any] | tuple[Any, ...] | None,
    cutting: Callable[[], AbstractContextManager[None]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """Cut the parameters, under ``cutting()``; if the first call decides how, returns a wrapper for the call."""
    if options.shard_parameters:  # along the first dim, whatever the graph reads
        shape = options.strategy.storage_shape(mesh.size, mesh.shape)
        grid = mesh.device_mesh if shape == mesh.shape else mesh.grid(*shape)
        with cutting():
            keep_parts(model, grid, first_dims(model, mesh.size))
        return None
    sharing = options.strategy.weights_mesh(mesh).device_mesh
    if inputs is not None:
        dims = parameter_dims(model, options, mesh, *arguments_of(inputs))
        with cutting():
            keep_parts(model, sharing, dims)
        return None
    keep_parts(model, sharing, {})

    def settle(call: Callable[..., Any]) -> Callable[..., Any]:
        is_settled = False

        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_settled
            if not is_settled:
                # even if the first call is an evaluation, cut parameters as training reads them
                with torch.inference_mode(False), torch.enable_grad():
                    dims = parameter_dims(model, options, mesh, args, kwargs)
                    with cutting():
                        keep_less(model, dims)
                is_settled = True
            return call(*args, **kwargs)

        return run

    return settle


def _check_module(model: nn.Module, mesh: Mesh, cuts: bool) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            describe(
                "torch.compile cannot see through the forward of DistributedDataParallel",
                found=f"DistributedDataParallel around {type(model.module).__name__}",
                fix="parallelize the model it wraps, before or after: parallelize(ddp.module, ...)",
            )
        )
    if model._compiled_call_impl is not None or hasattr(model, "_orig_mod"):
        raise UsageError(
            describe(
                "this module is compiled already",
                found=type(model).__name__,
                fix="parallelize the module as it was made; a copy.deepcopy of it is not compiled",
            )
        )
    devices: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(str(parameter.device), name)
    if len(devices) > 1:
        raise UsageError(
            describe(
                "the module's parameters are on several devices",
                found=", ".join(f"{name} on {device}" for device, name in devices.items()),
                fix="move the module to one device",
            )
        )
    expected = mesh.device_mesh.device_type
    for device in map(torch.device, devices):
        if device.type != expected and not (device.type == "meta" and cuts):
            raise UsageError(
                describe(
                    "the module is on another device than its mesh",
                    found=f"parameters on {device.type}, a mesh of {expected}",
                    fix=f"move the module to {expected}, or pass a mesh of {device.type}",
                )
            )


def _telling(call: Callable[..., Any], agreement: Agreement | None) -> Callable[..., Any]:
    """``call``; the ranks that wait for this one are notified of its errors."""
    if agreement is None:
        return call

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with agreement.telling_failure():
            return call(*args, **kwargs)

    return run
