"""Stock trainers on ranks that share sequences: Hugging Face's ``Trainer``, TRL's, and loops with accelerate.

    args = TrainingArguments(..)
    model = prepare(model, "ulysses")
    trainer = Trainer(model=model, args=args, ..)

accelerate knows ranks that get the same batches: those of tensor parallelism. A trainer whose model was prepared gets a
``ParallelismConfig`` of that kind, and a subclass of its class for what accelerate and Trainer do once a rank:

1. Evaluation counts each sample once, also in the last batch; so do token and flop counters.
2. No DDP is put around the model. Averages over data parallel dims of the mesh are its own.
3. Where only the loss is used, a call returns the loss alone, and no logits are gathered.
4. Checkpoints hold whole tensors where ranks keep parts, as those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.frontend.parallelize import parallelize
from sptransform.graph import dataflow
from sptransform.integrations import checkpoints, fused_head
from sptransform.integrations.data_parallel import layout_of, share_data
from sptransform.passes.normalize.drop_sequences import DropSequences
from sptransform.strategies.names import StrategyLike

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(eq=False)
class _Shared:
    """How ranks share a prepared model.

    Attributes:
        num_sequence: number of ranks that share each sequence.
        num_data: number of groups of them.
        uses_loss_alone: whether the trainer reads nothing but the loss where it trains, or evaluates the loss alone;
            None before its first step.
    """

    num_sequence: int
    num_data: int
    uses_loss_alone: bool | None = None


_prepared: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()


def prepare(
    model: ModuleT,
    strategy: StrategyLike,
    *,
    mesh: DeviceMesh | None = None,
    outputs: str | None = None,
    **options: Any,
) -> ModuleT:
    """:func:`sptransform.parallelize` a model for stock trainers, which then give ranks the batches they need.

    Call it on every rank before the trainer, or the ``Accelerator``, is made, and after adapters are added. It moves
    the model to this rank's device. The process group is started if it is not, as ``TrainingArguments`` would.

    Args:
        model: a model of Transformers, a ``PeftModel``, or any module that the trainer takes.
        strategy: as for ``parallelize``.
        mesh: all ranks in order. Dims named "dp_replicate" (gradients are averaged by DDP) and "dp_shard" (FSDP2) come
            first, and have different batches; the others are for the strategy. Default: all ranks share each sequence.
        outputs: as for ``parallelize``. Default: whole tensors, but where ``Trainer`` uses nothing but the loss of a
            call, that alone.
        options: those of ``parallelize``.

    Returns:
        the same module.

    Raises:
        UsageError: an argument is wrong, a trainer or ``Accelerator`` was made before, or there is one process only.
    """
    from accelerate.state import PartialState, is_initialized

    if is_initialized():
        _check_accelerator_knows(mesh)
    state = PartialState()
    if not dist.is_initialized() or state.num_processes != dist.get_world_size():
        found = f"{state.num_processes} process{'es' * (state.num_processes > 1)} known to accelerate"
        raise UsageError(
            describe("ranks share a sequence, and there are none", found=found, fix="torchrun --nproc-per-node 2 ..")
        )
    if mesh is None:
        mesh = init_device_mesh(state.device.type, (state.num_processes,), mesh_dim_names=("sp",))
    layout = layout_of(mesh)
    if all(parameter.device.type != "meta" for parameter in model.parameters()):
        model.to(state.device)
    shared = _Shared(layout.sequences.size(), layout.num_data)
    if outputs is None:
        options["passes"] = [*options.get("passes", ()), ReturnLossAlone(shared)]
    options["rules"] = fused_head.RULES | dict(options.get("rules") or {})
    parallelize(model, strategy, mesh=layout.sequences, outputs=outputs or "full", **options)
    if layout.data is not None and layout.num_data > 1:
        share_data(model, layout)
    checkpoints.takes_whole_states(model)
    _prepared[model] = shared
    _check_calls(model, shared)
    _attach_to_trainers()
    return model


def parallelism_config(model: nn.Module) -> Any:
    """What to make an ``Accelerator`` of, for a loop of one's own: ``Accelerator(parallelism_config=..)``.

    The ``Accelerator`` then gives ranks that share sequences the same batches, counts their samples once in
    ``gather_for_metrics``, and wraps the model in nothing. Trainers need no call of it.

    Args:
        model: what ``prepare`` returned.

    Returns:
        an ``accelerate.ParallelismConfig``.

    Raises:
        UsageError: the model was not prepared.
    """
    shared = _shared_of(model)
    if shared is None:
        raise UsageError(describe("this model was not prepared", found=type(model).__name__, fix="prepare(model, ..)"))
    return _config_class()(tp_size=shared.num_sequence, dp_shard_size=shared.num_data)


@dataclass(frozen=True)
class ReturnLossAlone(Pass):
    """Return only what has no sequence, where the trainer uses nothing else: while it trains, or under inference mode.

    ``(%loss, %logits)`` becomes ``(%loss, None)``. A call without a loss stays as it is.
    """

    shared: _Shared = field(repr=False)

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    ensures: ClassVar[frozenset[str]] = frozenset({"functional"})
    after: ClassVar[str] = "RecognizeScans"

    def run(self, graph: fx.Graph, context: Context) -> None:
        is_used_alone = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        returned = [x for x in dataflow.operands(graph.output_node()) if dataflow.handles_tensors(x)]
        has_loss = any(not dataflow.shape(x) for x in returned)
        if self.shared.uses_loss_alone and is_used_alone and has_loss:
            DropSequences().run(graph, replace(context, outputs="loss"))


def _check_accelerator_knows(mesh: DeviceMesh | None) -> None:
    """Refuse a model that is prepared after its trainer, which takes all ranks for data parallelism."""
    from accelerate.state import AcceleratorState

    config = AcceleratorState().parallelism_config
    num_shared = config.tp_size if config is not None else 1
    expected = layout_of(mesh).sequences.size() if mesh is not None else dist.get_world_size()
    if num_shared != expected:
        raise UsageError(
            describe(
                "an Accelerator exists, and gives ranks of one sequence different batches",
                found=f"{num_shared} ranks get the same batches, and {expected} share a sequence",
                fix="prepare the model before Trainer is made; if that one is of an earlier run, make TrainingArguments "
                "of this run first",
            )
        )


def _check_calls(model: nn.Module, shared: _Shared) -> None:
    """Let a call raise where accelerate is in use and does not know that ranks share sequences."""
    call = model._compiled_call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        from accelerate.state import AcceleratorState, is_initialized

        if is_initialized():
            config = AcceleratorState().parallelism_config
            if config is None or config.tp_size != shared.num_sequence:
                raise UsageError(
                    describe(
                        "accelerate gives ranks of one sequence different batches",
                        found=f"a model prepared for {shared.num_sequence} ranks that share a sequence, and an "
                        "Accelerator that does not know of them",
                        fix="prepare(model, ..) before Trainer(model=model, ..), not in model_init; or "
                        "Accelerator(parallelism_config=parallelism_config(model))",
                    )
                )
        return call(*args, **kwargs)

    # nn.Module calls this in the place of its forward; an outer torch.compile must not trace into it
    model._compiled_call_impl = torch.compiler.disable(run)


def _wrapped(by: str) -> UsageError:
    return UsageError(
        describe(
            "a prepared model is sharded and averages its gradients by itself",
            found=by,
            fix="no FSDP or DeepSpeed in TrainingArguments or accelerate's launch config; a mesh dim 'dp_shard' "
            "in prepare(mesh=..), or shard_parameters=True, shards parameters",
        )
    )


@cache
def _attach_to_trainers() -> None:
    """Let every trainer look, where it makes its Accelerator, whether its model was prepared."""
    from transformers import Trainer

    create = Trainer.create_accelerator_and_postprocess

    @wraps(create)
    def create_attached(self: Any) -> None:
        shared = _shared_of(self.model)
        if shared is None:
            create(self)
            return
        _check_arguments(self.args)
        self.args.parallelism_config = parallelism_config(self.model)
        try:
            create(self)
        finally:
            self.args.parallelism_config = None  # it holds process groups, and arguments are saved
        if not isinstance(self, _Sharing):
            self.__class__ = _sharing(type(self))
        self.shared = shared
        fused_head.capture_trl()

    Trainer.create_accelerator_and_postprocess = create_attached


def _shared_of(model: Any) -> _Shared | None:
    """How ranks share ``model``, or a part of it; None if it was not prepared."""
    if not isinstance(model, nn.Module):
        return None
    if model in _prepared:
        return _prepared[model]
    inner = next((module for module in model.modules() if module in _prepared), None)
    if inner is not None and hasattr(model, "peft_config"):
        raise UsageError(
            describe(
                "adapters were put around a prepared model, which they call without what prepare made of it",
                found=f"{type(model).__name__} around {type(inner).__name__}",
                fix="prepare(get_peft_model(model, config), ..), and no peft_config for the trainer",
            )
        )
    return None if inner is None else _prepared[inner]


def _check_arguments(args: Any) -> None:
    """Refuse what would be done twice."""
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise _wrapped(f"TrainingArguments({name}={getattr(args, name)!r})")
    if args.parallelism_config is not None:
        raise UsageError(
            describe(
                "the mesh given to prepare says how ranks are used",
                found="TrainingArguments(parallelism_config=..)",
                fix="leave it out",
            )
        )
    if args.torch_compile:
        raise UsageError(
            describe("a prepared model is compiled already", found="torch_compile=True", fix="torch_compile=False")
        )


@cache
def _config_class() -> type:
    """accelerate's class, which is shown the Accelerator that is made of it."""
    from accelerate import ParallelismConfig

    class SharedSequences(ParallelismConfig):
        def _validate_accelerator(self, accelerator: Any) -> None:
            if accelerator.state.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
                raise _wrapped(f"Accelerator with {accelerator.state.distributed_type.value}")
            accelerator.gather_for_metrics = partial(_gather_for_metrics, accelerator)
            accelerator.prepare_data_loader = partial(_prepare_data_loader, accelerator, accelerator.prepare_data_loader)
            # without DDP
            accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
            # it matches parameters in optimizers by the address of this rank's part, which is 0 if it is empty
            accelerator._prepare_tp = lambda *args: args

    return SharedSequences


def _prepare_data_loader(accelerator: Any, prepare: Any, *args: Any, **kwargs: Any) -> Any:
    config = accelerator.dataloader_config
    if accelerator.parallelism_config.dp_shard_enabled:
        if config.dispatch_batches:
            raise UsageError(
                describe(
                    "accelerate reads iterable datasets on one rank for all, and gives all groups the same batches",
                    found="dispatch_batches=True, and data parallelism",
                    fix="dispatch_batches=False",
                )
            )
        config.dispatch_batches = False
    return prepare(*args, **kwargs)


def _gather_for_metrics(accelerator: Any, input_data: Any, use_gather_object: bool = False) -> Any:
    """``Accelerator.gather_for_metrics``, but of ranks that share sequences it has what one of them has.

    Numbers without dimensions are gathered from all ranks: trainers divide what they count by the ranks that share.
    """
    from accelerate.utils import gather_object, recursively_apply

    config, state = accelerator.parallelism_config, accelerator.gradient_state
    is_first = accelerator.process_index % config.tp_size == 0
    kept: int | None = None
    if state.end_of_dataloader and state.remainder > 0:
        loader = state.active_dataloader
        # a dispatcher reads one batch for all ranks, and counts it once a rank
        kept = state.remainder // (config.tp_size if hasattr(loader, "slice_fn") else 1)
    try:
        recursively_apply(lambda x: x, input_data, error_on_other_type=True)
    except TypeError:
        use_gather_object = True
    if use_gather_object:
        return gather_object(input_data if is_first else [])[:kept]

    def gathered(x: Tensor) -> Tensor:
        if x.dim() == 0:
            return accelerator.gather(x)
        if config.data_parallel_size == 1:
            return x[:kept]
        group = accelerator.torch_device_mesh["dp"].get_group()
        out = x.new_empty(config.data_parallel_size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out[:kept]

    return recursively_apply(gathered, input_data)


@cache
def _sharing(stock: type) -> type:
    """The class of a trainer of ``stock`` whose model was prepared; it has the same name."""
    names = {name: getattr(stock, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(stock.__name__, (_Sharing, stock), names)


class _Sharing:
    """What a trainer does otherwise where ranks share sequences."""

    shared: _Shared

    def get_tp_size(self) -> int:
        return self.shared.num_sequence

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._uses_loss_alone()
        return super().training_step(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        # inference mode is a compile of its own, which no_grad is not told apart from otherwise
        with torch.inference_mode() if self._uses_loss_alone() and prediction_loss_only else nullcontext():
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _uses_loss_alone(self) -> bool:
        from transformers import Trainer

        is_stock = type(self).compute_loss is Trainer.compute_loss
        is_alone = is_stock and self.compute_loss_func is None and self.label_smoother is None
        before = self.shared.uses_loss_alone
        if before and not is_alone:
            raise UsageError(
                describe(
                    "this model was compiled to return its loss alone, for a trainer that used nothing else",
                    found=f"{type(self).__name__}, which may read its logits",
                    fix="prepare(.., outputs='full'), or a model of its own for each trainer",
                )
            )
        self.shared.uses_loss_alone = is_alone
        return is_alone

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_tp_size()

    def floating_point_ops(self, inputs: Any) -> float:
        return super().floating_point_ops(inputs) / self.get_tp_size()

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is None and checkpoints.keeps_parts(self.model):
            state_dict = checkpoints.whole_state(self.model)  # on all ranks; the first one saves it
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        whole = checkpoints.whole_optimizer_state(self.optimizer) if checkpoints.keeps_parts(self.model) else None
        with _hooked(self.optimizer, "register_state_dict_post_hook", lambda optimizer, state: whole):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _hooked(self.optimizer, "register_load_state_dict_pre_hook", checkpoints.optimizer_parts):
            super()._load_optimizer_and_scheduler(checkpoint)


@contextmanager
def _hooked(optimizer: Any, register: str, hook: Any) -> Iterator[None]:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    handle = getattr(optimizer, register)(hook)
    try:
        yield
    finally:
        handle.remove()
