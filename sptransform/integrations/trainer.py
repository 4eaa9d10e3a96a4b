"""Stock trainers on ranks that share sequences: Hugging Face's ``Trainer``, and what is made of it, such as TRL's.

    args = TrainingArguments(..)
    model = prepare(model, "ulysses")
    trainer = Trainer(model=model, args=args, ..)

A trainer whose model was prepared makes its Accelerator of :func:`parallelism_config`, and becomes one of a
subclass:

1. Where only the loss is used, a call returns the loss alone, and no logits are gathered.
2. Checkpoints hold whole tensors where ranks keep parts, as those of one process.
3. Tokens and flops are counted once, not once a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.frontend.parallelize import parallelize
from sptransform.integrations import checkpoints, fused_head
from sptransform.integrations.accelerate import (
    Shared,
    check_accelerator,
    gather_groups,
    is_prepared,
    mark_prepared,
    parallelism_config,
    refused_wrapper,
    shared_by,
)
from sptransform.integrations.data_parallel import check_cut, layout_of, share_data
from sptransform.integrations.return_loss_alone import ReturnLossAlone
from sptransform.parameters.broadcast import broadcast_parameters
from sptransform.strategies.names import StrategyLike, strategy_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
    from accelerate.state import PartialState

    on_cpu = not torch.accelerator.is_available() if mesh is None else mesh.device_type == "cpu"
    state = PartialState(cpu=on_cpu)  # as TrainingArguments made it, if they exist
    if not dist.is_initialized() or state.num_processes != dist.get_world_size():
        found = f"{state.num_processes} process{'es' * (state.num_processes > 1)} known to accelerate"
        raise UsageError(
            describe("ranks share a sequence, and there are none", found=found, fix="torchrun --nproc-per-node 2 ..")
        )
    if mesh is None:
        mesh = init_device_mesh(state.device.type, (state.num_processes,), mesh_dim_names=("sp",))
    layout = layout_of(mesh)
    is_cut_later = strategy_of(strategy).shards_weights and options.get("inputs") is None
    keeps_parts = strategy_of(strategy).shards_weights or bool(options.get("shard_parameters"))
    check_cut(layout, keeps_parts, not is_cut_later)
    shared = Shared(layout.sequences.size(), layout.num_data, outputs or "full")
    check_accelerator(shared.num_sequence)
    if all(parameter.device.type != "meta" for parameter in model.parameters()):
        model.to(state.device)
        if layout.data is not None:
            broadcast_parameters(model, layout.data)  # as DDP does; along a sequence they have to be equal
    if outputs is None:
        options["passes"] = [*options.get("passes", ()), ReturnLossAlone(shared.loss_alone)]
        shared.loss_alone.of(model)
    options["rules"] = fused_head.RULES | dict(options.get("rules") or {})
    parallelize(model, strategy, mesh=layout.sequences, outputs=shared.outputs, **options)
    if layout.data is not None and layout.num_data > 1:
        shared.no_sync = share_data(model, layout)
    checkpoints.takes_whole_states(model)
    mark_prepared(model, shared)
    _attach_to_trainers()
    return model


@cache
def _attach_to_trainers() -> None:
    """Let every trainer look, where it makes its Accelerator, whether its model was prepared."""
    from transformers import Trainer

    create = Trainer.create_accelerator_and_postprocess

    @wraps(create)
    def create_attached(self: Any) -> None:
        shared = shared_by(self.model)
        if shared is None:
            create(self)
            return
        _check_arguments(self.args, shared)
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


def _check_arguments(args: Any, shared: Shared) -> None:
    """Refuse what would be done twice, and what trainers know nothing of."""
    if shared.outputs == "local":
        raise UsageError(
            describe(
                "trainers compute losses and metrics of whole sequences",
                found="prepare(.., outputs='local'), which returns this rank's part",
                fix="prepare without outputs, or outputs='dtensor'; 'local' is for a loop that sums over ranks itself",
            )
        )
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise refused_wrapper(f"TrainingArguments({name}={getattr(args, name)!r})")
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
def _sharing(stock: type) -> type:
    """The class of a trainer of ``stock`` whose model was prepared; it has the same name."""
    names = {name: getattr(stock, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(stock.__name__, (_Sharing, stock), {**names, "_stock": stock})


class _Sharing:
    """What a trainer does otherwise where ranks share sequences."""

    _stock: type
    shared: Shared

    def get_tp_size(self) -> int:
        return self.shared.num_sequence

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.shared.loss_alone.enough(self._uses_loss_alone("training_step")):
            return super().training_step(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        with self.shared.loss_alone.enough(prediction_loss_only and self._uses_loss_alone("prediction_step")):
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _uses_loss_alone(self, step: str) -> bool:
        """Whether this step is Trainer's own, calls the prepared model itself, and reads the loss that it computes."""
        from transformers import Trainer

        is_stock = all(getattr(self._stock, name) is getattr(Trainer, name) for name in (step, "compute_loss"))
        is_models = self.compute_loss_func is None and self.label_smoother is None
        return is_stock and "compute_loss" not in vars(self) and is_models and is_prepared(self.model)

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        number = super()._get_num_items_in_batch(*args, **kwargs)
        if torch.is_tensor(number) and not self.args.average_tokens_across_devices:
            # Trainer divides by the ranks that share, also where it has counted this rank's alone
            number = (number * self.get_tp_size()).round()
        return number

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.gather_function == self.accelerator.gather:  # Seq2SeqTrainer's choice
            self.gather_function = partial(gather_groups, self.accelerator)
        return super().evaluation_loop(*args, **kwargs)

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
