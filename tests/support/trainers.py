"""Stock trainers as torchrun would start them on every rank, and as one process runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import Trainer, TrainingArguments

from sptransform.integrations.transformers import prepare
from tests.support.models import IGNORED, build

# steps of several micro-batches; per step and rank of data parallelism
STEPS, ACCUMULATION, BATCH, LAYERS = 4, 2, 2, 1
NUM_ROWS = STEPS * ACCUMULATION * BATCH


class Rows(torch.utils.data.Dataset):
    """Sequences with different numbers of labels, so that micro-batches weigh differently."""

    def __init__(self, number: int = NUM_ROWS) -> None:
        inputs = build("llama", batch=number)[1]
        self.rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
        for i, row in enumerate(self.rows):
            row["labels"][: 3 * i] = IGNORED

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):
    """The same, without a length."""

    def __init__(self, number: int = NUM_ROWS) -> None:
        self.rows = Rows(number).rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.rows)


@contextmanager
def launched(rank: int, world_size: int) -> Iterator[None]:
    """What torchrun sets; with one rank, nothing. accelerate keeps what it found in the process, until the end."""
    found = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    found |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}
    with mock.patch.dict(os.environ, found if world_size > 1 else {}):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def arguments(directory: str, **changed: Any) -> dict[str, Any]:
    """Of ``TrainingArguments``, or of TRL's."""
    return {
        "output_dir": directory,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "per_device_eval_batch_size": 8,
        "disable_tqdm": True,
        **changed,
    }


def prepared(model: torch.nn.Module, strategy: str, dims: dict[str, int] | None = None, **options: Any) -> Any:
    mesh = None if dims is None else init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))
    return prepare(model, strategy, mesh=mesh, **{"backend": "aot_eager", **options})


def run(trainer: Trainer, resume: str | None = None) -> dict[str, Any]:
    """Losses and gradient norms of all steps, and the model's files in the end."""
    trainer.train(resume_from_checkpoint=resume)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return {
        "losses": [entry["loss"] for entry in history],
        "norms": [entry["grad_norm"] for entry in history],
        "history": history,
        "saved": load_file(Path(trainer.args.output_dir) / "model.safetensors"),
    }


def train(
    rank: int,
    world_size: int,
    directory: str,
    strategy: str,
    *,
    dims: dict[str, int] | None = None,
    options: dict[str, Any] | None = None,
    streams: bool = False,
    evaluates: bool = False,
    resume: str | None = None,
    **changed: Any,
) -> dict[str, Any]:
    """``Trainer`` on a model that is prepared, or with one rank, is not."""
    with launched(rank, world_size):
        args = TrainingArguments(**arguments(directory, **changed))
        model = build("llama", layers=LAYERS, dtype=torch.float32)[0]
        if world_size > 1:
            prepared(model, strategy, dims, **(options or {}))
        data = Stream() if streams else Rows()
        held_out = Stream(11) if streams else Rows(11)  # the last batch is short
        trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=held_out)
        found = run(trainer, resume)
        if evaluates:
            trainer.compute_metrics = lambda given: {"rows": len(given.predictions), "sum": float(given.predictions.sum())}
            metrics = trainer.evaluate()
            found["evaluated"] = {name: metrics[f"eval_{name}"] for name in ("loss", "rows", "sum")}
            trainer.compute_metrics = None
            found["loss_alone"] = trainer.evaluate()["eval_loss"]
            found["predictions"] = trainer.predict(held_out).predictions
        return found
