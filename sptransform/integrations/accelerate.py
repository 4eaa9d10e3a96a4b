"""What an ``accelerate.Accelerator`` is told where ranks share sequences.

accelerate knows ranks that get the same batches, those of tensor parallelism. :func:`parallelism_config` is a
``ParallelismConfig`` of that kind. It is shown the Accelerator that is made of it, and changes it:

1. ``gather_for_metrics`` counts each sample once, also in the last batch.
2. Neither DDP nor anything else is put around the model.
3. A scheduler takes a step for each group of ranks, since ranks of a group read no batch of their own.
4. With data parallelism beside it, each rank reads iterable datasets itself.
5. Where ranks keep parts of parameters, states of models are whole.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.integrations import checkpoints
from sptransform.integrations.return_loss_alone import LossAlone


@dataclass(eq=False)
class Shared:
    """How ranks share a prepared model.

    Attributes:
        num_sequence: number of ranks that share each sequence.
        num_data: number of groups of them.
        outputs: as ``parallelize`` was told.
        loss_alone: what its calls return.
        no_sync: a context in which gradients are not averaged over groups yet; None if they are not at all, or always.
    """

    num_sequence: int
    num_data: int
    outputs: str = "full"
    loss_alone: LossAlone = field(default_factory=LossAlone)
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None


_prepared: WeakKeyDictionary[nn.Module, Shared] = WeakKeyDictionary()


def mark_prepared(model: nn.Module, shared: Shared) -> None:
    """Remember that ``model`` is shared so, and let its calls raise where accelerate does not know of it."""
    _prepared[model] = shared
    call = model._compiled_call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        check_accelerator(shared.num_sequence)
        return call(*args, **kwargs)

    # nn.Module calls this in the place of its forward; an outer torch.compile must not trace into it
    model._compiled_call_impl = torch.compiler.disable(run)


def is_prepared(model: nn.Module) -> bool:
    """Whether it is the very module that was prepared, and not one around it."""
    return model in _prepared


def shared_by(model: Any) -> Shared | None:
    """How ranks share ``model``, or a part of it; None if it was not prepared.

    Raises:
        UsageError: adapters are around a prepared model.
    """
    if not isinstance(model, nn.Module):
        return None
    inner = next((module for module in model.modules() if module in _prepared), None)
    if inner is None or inner is model:
        return _prepared.get(model)
    if hasattr(model, "peft_config"):
        raise UsageError(
            describe(
                "adapters were put around a prepared model, which they call without what prepare made of it",
                found=f"{type(model).__name__} around {type(inner).__name__}",
                fix="prepare(get_peft_model(model, config), ..), and no peft_config for the trainer",
            )
        )
    return _prepared[inner]


def check_accelerator(num_sequence: int) -> None:
    """Raise UsageError if accelerate is in use, and not told that so many ranks share each sequence."""
    from accelerate.state import AcceleratorState, is_initialized

    if not is_initialized():
        return
    config = AcceleratorState().parallelism_config
    if config is None or config.tp_size != num_sequence:
        raise UsageError(
            describe(
                "accelerate gives ranks of one sequence different batches",
                found=f"{num_sequence} ranks share a sequence, and an Accelerator was made that does not know of it",
                fix="prepare(model, ..) before Trainer(model=model, ..) is made, and not in model_init; if that one is "
                "of an earlier run, make the TrainingArguments of this run first; in a loop of your own, "
                "Accelerator(parallelism_config=parallelism_config(model))",
            )
        )


def parallelism_config(model: nn.Module) -> Any:
    """What to make an ``Accelerator`` of in a loop of one's own: ``Accelerator(parallelism_config=..)``.

    It then gives ranks that share sequences the same batches, and counts their samples once. Trainers call it
    themselves.

    Args:
        model: what ``prepare`` returned.

    Returns:
        an ``accelerate.ParallelismConfig``.

    Raises:
        UsageError: the model was not prepared.
    """
    shared = shared_by(model)
    if shared is None:
        raise UsageError(describe("this model was not prepared", found=type(model).__name__, fix="prepare(model, ..)"))
    # accelerate wants a name for data parallelism; what is averaged or sharded along it is the model's own
    return _config_class()(tp_size=shared.num_sequence, dp_shard_size=shared.num_data)


def refused_wrapper(found: str) -> UsageError:
    return UsageError(
        describe(
            "a prepared model is sharded, and averages its gradients, by itself",
            found=found,
            fix="no FSDP or DeepSpeed in TrainingArguments or accelerate's launch config; a mesh dim 'dp_shard' in "
            "prepare(mesh=..), or shard_parameters=True, shards parameters",
        )
    )


@cache
def _config_class() -> type:
    from accelerate import ParallelismConfig

    class SharedSequences(ParallelismConfig):
        def _validate_accelerator(self, accelerator: Any) -> None:
            kind = accelerator.state.distributed_type.value
            if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
                raise refused_wrapper(f"an Accelerator of {kind}")
            accelerator.gather_for_metrics = partial(_gather_for_metrics, accelerator)
            load = accelerator.prepare_data_loader
            accelerator.prepare_data_loader = partial(_prepare_data_loader, accelerator, load)
            accelerator.prepare_model = partial(_prepare_model, accelerator, accelerator.prepare_model)
            accelerator.prepare_scheduler = partial(_prepare_scheduler, accelerator, accelerator.prepare_scheduler)
            accelerator.get_state_dict = partial(_state_dict, accelerator.get_state_dict)
            accelerator.save_state = partial(_save_state, accelerator, accelerator.save_state)
            accelerator.no_sync = partial(_no_sync, accelerator.no_sync)
            # it matches parameters in optimizers by the address of this rank's part, which is 0 if it is empty
            accelerator._prepare_tp = lambda *args: args

    return SharedSequences


def _no_sync(no_sync: Any, model: Any) -> AbstractContextManager[Any]:
    shared = shared_by(model)
    return no_sync(model) if shared is None or shared.no_sync is None else shared.no_sync()


def _state_dict(get: Any, model: Any, unwrap: bool = True) -> dict[str, Any]:
    return checkpoints.whole_state(model) if checkpoints.keeps_parts(model) else get(model, unwrap)


def _save_state(accelerator: Any, save: Any, *args: Any, **kwargs: Any) -> Any:
    """``Accelerator.save_state``, which would write the first rank's part of an optimizer's state for that of all."""
    if any(checkpoints.keeps_parts(model) for model in accelerator._models):
        raise UsageError(
            describe(
                "accelerate saves what the first rank has, and ranks keep parts",
                found="save_state(..)",
                fix="torch.distributed.checkpoint; accelerator.save_model(model, ..) for weights alone",
            )
        )
    return save(*args, **kwargs)


def _prepare_model(
    accelerator: Any, prepare: Any, model: Any, device_placement: bool | None = None, evaluation_mode: bool = False
) -> Any:
    """``Accelerator.prepare_model`` without DDP, which would average what a prepared model has averaged."""
    if not evaluation_mode and accelerator.parallelism_config.data_parallel_size > 1:
        averaged = {id(x) for part in model.modules() if part in _prepared for x in part.parameters()}
        for name, x in model.named_parameters():
            if x.requires_grad and id(x) not in averaged:
                raise UsageError(
                    describe(
                        "groups of ranks get different batches, and only a prepared model averages its gradients",
                        found=f"parameter {name!r} of {type(model).__name__}, which is no part of one",
                        fix="prepare the whole model, or freeze the parameter",
                    )
                )
    return prepare(model, device_placement, evaluation_mode=True)


def _prepare_scheduler(accelerator: Any, prepare: Any, scheduler: Any) -> Any:
    """``Accelerator.prepare_scheduler``, which takes as many steps at once as ranks read batches at once."""
    prepared = prepare(scheduler)
    if prepared is scheduler or prepared.split_batches:
        return prepared
    step, num_groups = prepared.step, accelerator.parallelism_config.data_parallel_size
    prepared.split_batches = True  # to accelerate, one step

    def run(*args: Any, **kwargs: Any) -> None:
        inner, is_step = prepared.scheduler, prepared.step_with_optimizer and prepared.gradient_state.sync_gradients
        for _ in range(num_groups if is_step else 1):
            # accelerate lets a scheduler that has an end stay there
            if not is_step or not hasattr(inner, "total_steps") or inner._step_count <= inner.total_steps:
                step(*args, **kwargs)

    prepared.step = run
    return prepared


def _prepare_data_loader(accelerator: Any, prepare: Any, loader: Any, *args: Any, **kwargs: Any) -> Any:
    config, shares = accelerator.dataloader_config, accelerator.parallelism_config
    if shares.dp_shard_enabled:
        if config.dispatch_batches:
            raise UsageError(
                describe(
                    "with dispatch_batches accelerate gives all ranks the same batches, also those of data parallelism",
                    found="dispatch_batches=True",
                    fix="dispatch_batches=False in accelerator_config",
                )
            )
        config.dispatch_batches = False
    if getattr(loader.batch_sampler, "dp_size", shares.data_parallel_size) != shares.data_parallel_size:
        raise UsageError(
            describe(
                "this sampler gives every rank batches of its own",
                found=type(loader.batch_sampler).__name__,
                fix="another train_sampling_strategy",
            )
        )
    seeded = loader.worker_init_fn
    if isinstance(seeded, partial) and "rank" in seeded.keywords:
        # workers that draw random numbers, to mask tokens for one, draw the same for all ranks of a group
        rank = seeded.keywords["rank"] // shares.tp_size
        loader.worker_init_fn = partial(seeded.func, *seeded.args, **{**seeded.keywords, "rank": rank})
    return prepare(loader, *args, **kwargs)


def _gather_for_metrics(accelerator: Any, input_data: Any, use_gather_object: bool = False) -> Any:
    """``Accelerator.gather_for_metrics``, but of ranks that share sequences it has what one of them has.

    Numbers without dimensions are gathered from all ranks: trainers divide what they count by the ranks that share.
    """
    from accelerate.utils import gather_object, recursively_apply

    config, state = accelerator.parallelism_config, accelerator.gradient_state
    kept: int | None = None
    if state.end_of_dataloader and state.remainder > 0:
        # a dispatcher reads one batch for all ranks, and counts it once a rank
        is_dispatched = hasattr(state.active_dataloader, "slice_fn")
        kept = state.remainder // (config.tp_size if is_dispatched else 1)
    try:
        recursively_apply(lambda x: x, input_data, error_on_other_type=True)
    except TypeError:
        use_gather_object = True
    if use_gather_object:
        is_first = accelerator.process_index % config.tp_size == 0
        return gather_object(input_data if is_first else [])[:kept]

    return recursively_apply(lambda x: x if x.dim() == 0 else x[:kept], gather_groups(accelerator, input_data))


def gather_groups(accelerator: Any, input_data: Any) -> Any:
    """``Accelerator.gather``, but of ranks that share sequences it has what one of them has; numbers are of all."""
    from accelerate.utils import recursively_apply

    num_groups = accelerator.parallelism_config.data_parallel_size

    def gathered(x: Tensor) -> Tensor:
        if x.dim() == 0:
            return accelerator.gather(x)
        if num_groups == 1:
            return x
        out = x.new_empty(num_groups * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=accelerator.torch_device_mesh["dp"].get_group())
        return out

    return recursively_apply(gathered, input_data, error_on_other_type=True)
