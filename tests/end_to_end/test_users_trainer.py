"""Hugging Face's Trainer on a parallelized model, in a subclass, against the Trainer on one device."""

import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainingArguments

import sptransform
from tests.support.collective_counts import CountCollectives
from tests.support.gloo_pool import get_pool
from tests.support.models import IGNORED, build

pytestmark = pytest.mark.timeout(280)

NUM_STEPS, ACCUMULATION, BATCH, NUM_LAYERS = 3, 2, 2, 1


class Rows(torch.utils.data.Dataset):
    """Sequences with different numbers of labels, so that micro-batches weigh differently."""

    def __init__(self) -> None:
        inputs = build("llama", batch=NUM_STEPS * ACCUMULATION * BATCH)[1]
        self.rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
        for i, row in enumerate(self.rows):
            row["labels"][: 4 * i] = IGNORED

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


class SequenceParallelTrainer(Trainer):
    """All ranks train one replica: they get the same batches, and the model is not wrapped."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)  # without DDP
        accelerator.prepare_data_loader = partial(self._same_batches, accelerator.prepare_data_loader)
        self.gather_function = accelerator.gather_for_metrics = self._own

    def get_tp_size(self):  # by how many ranks Trainer divides what it counted on all of them
        return self.args.world_size

    def _same_batches(self, prepare, *args, **kwargs):
        loader = prepare(*args, **kwargs)
        shard = loader.batch_sampler
        shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def _own(self, values):  # every rank has evaluated every batch; of the last one's loss there are too many copies
        state = self.accelerator.gradient_state
        is_short = state.end_of_dataloader and state.remainder > 0
        return values[: state.remainder] if is_short and hasattr(values, "shape") else values


def recording(base: type[Trainer]) -> type[Trainer]:
    """``base``, noting the number of items it is given for each loss."""

    class Recording(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
            self.num_items = [*getattr(self, "num_items", []), float(num_items_in_batch)]
            return super().compute_loss(*args, num_items_in_batch=num_items_in_batch, **kwargs)

    return Recording


def train(rank: int, world_size: int, directory: str, outputs: str, **arguments: Any) -> dict[str, Any]:
    """What torchrun would start on every rank; with one rank no process group is known to the Trainer."""
    launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    launched |= {"LOCAL_WORLD_SIZE": str(world_size)}
    with mock.patch.dict(os.environ, launched if world_size > 1 else {}):
        try:
            return _train(world_size, directory, outputs, **arguments)
        finally:  # accelerate keeps what it found in the process
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _train(world_size: int, directory: str, outputs: str, **arguments: Any) -> dict[str, Any]:
    model = build("llama", layers=NUM_LAYERS, dtype=torch.float32)[0]
    if world_size > 1:
        sptransform.parallelize(model, "ulysses", backend="aot_eager", outputs=outputs)
    args = TrainingArguments(
        output_dir=directory,
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        per_device_eval_batch_size=8,  # the last batch is short
        prediction_loss_only=outputs == "dtensor",
        disable_tqdm=True,
        **arguments,
    )
    make = recording(SequenceParallelTrainer if world_size > 1 else Trainer)
    trainer = make(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows())
    with CountCollectives() as counted:
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in history],
        "norms": [entry["grad_norm"] for entry in history],
        "num_items": list(trainer.num_items),
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "num_exchanges": sum(collective.name == "all_to_all_single" for collective in counted.collectives),
        "evaluated": trainer.evaluate()["eval_loss"],
        "predictions": trainer.predict(Rows()).predictions if outputs == "full" else None,
    }


CASES = {
    "float32": ({}, "full", 1e-5),
    "bf16-checkpointed": ({"bf16": True, "gradient_checkpointing": True}, "dtensor", 2e-2),
}


@pytest.mark.parametrize("case", ["float32", pytest.param("bf16-checkpointed", marks=pytest.mark.slow)])
def test_the_trainer_trains_as_on_one_device(tmp_path: Path, case: str) -> None:
    arguments, outputs, tolerance = CASES[case]
    (alone,) = get_pool(1).run(train, str(tmp_path), outputs, **arguments, timeout=200)
    for found in get_pool(2).run(train, str(tmp_path), outputs, **arguments, timeout=200):
        assert len(found["losses"]) == NUM_STEPS
        assert found["losses"] == pytest.approx(alone["losses"], rel=tolerance)
        assert found["norms"] == pytest.approx(alone["norms"], rel=tolerance)
        assert found["num_items"] == alone["num_items"]
        assert len(set(found["num_items"])) == NUM_STEPS
        assert found["num_exchanges"] == NUM_STEPS * ACCUMULATION * NUM_LAYERS * (2 + 2)
        for name, parameter in alone["parameters"].items():
            assert (found["parameters"][name] - parameter).abs().max() <= tolerance * parameter.abs().max(), name
        assert found["evaluated"] == pytest.approx(alone["evaluated"], rel=tolerance)
        if outputs == "full":
            assert found["predictions"].shape == alone["predictions"].shape
            assert abs(found["predictions"] - alone["predictions"]).max() < 1e-3
