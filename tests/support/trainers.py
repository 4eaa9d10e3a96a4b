"""Stock trainers as torchrun would start them on every rank, and as one process runs them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import tokenizers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import seed_worker

from sptransform import SPTransformError
from sptransform.integrations.transformers import parallelism_config, prepare
from tests.support import tiny
from tests.support.collective_counts import CountCollectives
from tests.support.models import IGNORED, build

STEPS, ACCUMULATION, BATCH, LAYERS = 3, 2, 2, 1
NUM_ROWS = STEPS * ACCUMULATION * BATCH * 2  # as many as two groups of ranks read


class Rows(torch.utils.data.Dataset):
    """Sequences with different numbers of labels, so that micro-batches weigh differently."""

    def __init__(self, number: int) -> None:
        inputs = build("llama", batch=max(number, 1))[1]
        self.rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
        for i, row in enumerate(self.rows):
            row["labels"][: 3 * i] = IGNORED

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class Stream(torch.utils.data.IterableDataset):
    """The same, without a length."""

    def __init__(self, number: int) -> None:
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
        "adam_epsilon": 0.1,  # else an update of a gradient near zero is rounding
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
        "counts": (trainer.state.num_input_tokens_seen, trainer.state.total_flos),
        "saved": load_file(Path(trainer.args.output_dir) / "model.safetensors"),
    }


def train(
    rank: int,
    world_size: int,
    directory: str,
    strategy: str = "ulysses",
    *,
    dims: dict[str, int] | None = None,
    options: dict[str, Any] | None = None,
    streams: bool = False,
    evaluated: int = 0,
    resume: str | None = None,
    counts: bool = False,
    of_sequences: bool = False,
    **changed: Any,
) -> dict[str, Any]:
    """``Trainer`` on a model that is prepared, or with one rank, is not; ``evaluated``: on how many rows."""
    with launched(rank, world_size):
        args = (Seq2SeqTrainingArguments if of_sequences else TrainingArguments)(**arguments(directory, **changed))
        model = build("llama", layers=LAYERS, dtype=torch.float32)[0]
        if world_size > 1:
            prepared(model, strategy, dims, **(options or {}))
        kind = Stream if streams else Rows
        stock = Seq2SeqTrainer if of_sequences else Trainer
        trainer = stock(model=model, args=args, train_dataset=kind(NUM_ROWS), eval_dataset=kind(evaluated))
        with CountCollectives() if counts else nullcontext() as counted:
            found = run(trainer, resume)
        found["collectives"] = {collective.name for collective in counted.collectives} if counts else set()
        found["evaluated"] = {}
        if evaluated:
            found["evaluated"]["loss alone"] = trainer.evaluate()["eval_loss"]
            trainer.compute_metrics = metrics
            more = trainer.evaluate()
            found["evaluated"] |= {name: more[f"eval_{name}"] for name in ("loss", "rows", "sum")}
        return found


def metrics(given: Any) -> dict[str, Any]:
    return {"rows": len(given.predictions), "sum": float(given.predictions.sum())}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {name: index for index, name in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(90))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def texts(number: int, seed: int, shortest: int, longest: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (number,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(90, (n,), generator=generator).tolist()) for n in lengths]


def fine_tune(
    rank: int,
    world_size: int,
    directory: str,
    strategy: str = "ulysses",
    *,
    dims: dict[str, int] | None = None,
    attention: str = "sdpa",
    num_held_out: int = 11,
    judged: tuple[str, ...] = ("loss", "mean_token_accuracy", "entropy"),
    **changed: Any,
) -> dict[str, Any]:
    """TRL's ``SFTTrainer``."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with launched(rank, world_size):
        chosen = {"pad_to_multiple_of": 64, "max_length": 64, "gradient_checkpointing": False, "bf16": False}
        args = SFTConfig(**arguments(directory, **{**chosen, **changed}))
        model = build("llama", layers=LAYERS, dtype=torch.float32)[0]
        model.set_attn_implementation(attention)
        if world_size > 1:
            prepared(model, strategy, dims)
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"text": texts(NUM_ROWS, 0, 10, 60)}),
            eval_dataset=Dataset.from_dict({"text": texts(num_held_out, 1, 10, 60)}),
            processing_class=tokenizer(),
        )
        found = run(trainer)
        evaluated = trainer.evaluate()
        found["evaluated"] = {name: evaluated[f"eval_{name}"] for name in judged}
        return found


def prefer(
    rank: int, world_size: int, directory: str, strategy: str = "ulysses", dims: Any = None, **changed: Any
) -> dict[str, Any]:
    """TRL's ``DPOTrainer``; the reference is a model of its own, and sharded too."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    with launched(rank, world_size):
        chosen = {"pad_to_multiple_of": 64, "gradient_checkpointing": False, "bf16": False}
        args = DPOConfig(**arguments(directory, **{**chosen, **changed}))
        model, reference = (build("llama", layers=LAYERS, dtype=torch.float32)[0] for _ in range(2))
        if world_size > 1:
            prepared(model, strategy, dims)
            prepared(reference, strategy, dims)
        pairs = {name: texts(NUM_ROWS, seed, 8, 28) for seed, name in enumerate(("prompt", "chosen", "rejected"))}
        trainer = DPOTrainer(
            model=model,
            ref_model=reference,
            args=args,
            train_dataset=Dataset.from_dict(pairs),
            eval_dataset=Dataset.from_dict({name: rows[:11] for name, rows in pairs.items()}),
            processing_class=tokenizer(),
        )
        found = run(trainer)
        found["evaluated"] = {"loss": trainer.evaluate()["eval_loss"]}
        return found


def accelerated(rank: int, world_size: int, directory: str, dims: dict[str, int] | None = None) -> dict[str, Any]:
    """A loop of one's own with accelerate: losses, predictions for rows that ranks do not share evenly, and labels."""
    with launched(rank, world_size):
        model = build("llama", layers=LAYERS, dtype=torch.float32)[0]
        config = None
        if world_size > 1:
            config = parallelism_config(prepared(model, "ulysses", dims))
        accelerator = Accelerator(cpu=True, parallelism_config=config)
        loaders = [torch.utils.data.DataLoader(Rows(number), batch_size=4) for number in (8, 7)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
        model, optimizer, scheduler, *loaders = accelerator.prepare(model, optimizer, scheduler, *loaders)
        losses, norms, rates = [], [], []
        for batch in loaders[0]:
            loss = model(**batch).loss
            accelerator.backward(loss)
            norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rates += scheduler.get_last_lr()
            losses.append(float(accelerator.gather(loss.detach()).mean()))
        model.eval()
        with torch.no_grad():
            gathered, objects = [], []
            for batch in loaders[1]:
                gathered.append(accelerator.gather_for_metrics((model(**batch).logits.argmax(-1), batch["labels"])))
                objects += accelerator.gather_for_metrics([str(row) for row in batch["labels"].sum(1).tolist()])
        predicted, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        found = {"losses": losses, "norms": norms, "rates": rates, "objects": objects}
        return {**found, "predicted": predicted, "labels": labels}


def counted(rank: int, world_size: int, dims: dict[str, int] | None = None) -> dict[str, Any]:
    """What ``gather_for_metrics`` has of seven rows in batches of four; the model is never called. And its bias."""
    with launched(rank, world_size):
        config, model = None, tiny.attention()
        with torch.no_grad():
            model.head.bias.fill_(float(rank // 2))  # another number in each group of two
        if world_size > 1:
            config = parallelism_config(prepared(model, "ulysses", dims))
        accelerator = Accelerator(cpu=True, parallelism_config=config)
        seeded = partial(seed_worker, num_workers=2, rank=accelerator.process_index)
        rows = [{"row": torch.tensor([i])} for i in range(7)]
        loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=4, worker_init_fn=seeded))
        found: dict[str, Any] = {"rows": [], "objects": [], "number": 0.0}
        found["seeds of"] = loader.worker_init_fn.keywords["rank"]
        for batch in loader:
            found["rows"] += accelerator.gather_for_metrics(batch["row"]).flatten().tolist()
            found["objects"] += accelerator.gather_for_metrics([str(int(row)) for row in batch["row"]])
            found["number"] = accelerator.gather_for_metrics(torch.tensor(2.0)).mean().item()
        bias = model.head.bias
        found["bias"] = float((bias.full_tensor() if isinstance(bias, DTensor) else bias).sum())
        return found


def refused(rank: int, world_size: int, directory: str) -> dict[str, str]:
    """What users get wrong, and what they are told."""
    messages = {}

    def attempt(name: str, run: Any) -> None:
        with launched(rank, world_size):
            try:
                run()
            except SPTransformError as error:
                messages[name] = str(error)

    def model() -> Any:
        return build("llama", layers=LAYERS, dtype=torch.float32)[0]

    def trainer(which: Any, **changed: Any) -> Trainer:
        given = arguments(directory, **changed)
        return Trainer(model=which, args=TrainingArguments(**given), train_dataset=Rows(8))

    def after_the_trainer() -> None:
        given = model()
        trainer(given)
        prepared(given, "ulysses")

    def in_model_init() -> None:
        args = TrainingArguments(**arguments(directory))
        Trainer(model_init=lambda: prepared(model(), "ulysses"), args=args, train_dataset=Rows(8)).train()

    def with_argument(**changed: Any) -> Any:
        return lambda: trainer(prepared(model(), "ulysses"), **changed)

    def dispatched() -> None:
        args = TrainingArguments(**arguments(directory, accelerator_config={"dispatch_batches": True}))
        given = prepared(model(), "ulysses", {"dp_shard": world_size, "sp": 1})
        Trainer(model=given, args=args, train_dataset=Stream(8)).train()

    def beside() -> None:
        inner = prepared(model(), "ulysses", {"dp_replicate": world_size, "sp": 1})
        trainer(torch.nn.Sequential(OrderedDict(inner=inner, head=torch.nn.Linear(2, 2)))).train()

    def other_seed() -> None:
        torch.manual_seed(rank)
        given = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=97))
        trainer(prepared(given, "ulysses")).train()

    def adapters_around() -> None:
        from peft import LoraConfig, get_peft_model

        trainer(get_peft_model(prepared(model(), "ulysses"), LoraConfig(target_modules=["q_proj"])))

    attempt("after the trainer", after_the_trainer)
    attempt("in model_init", in_model_init)
    attempt("torch_compile", with_argument(torch_compile=True))
    attempt("local", lambda: trainer(prepared(model(), "ulysses", outputs="local")))
    attempt("replicated parts", lambda: prepared(model(), "megatron", {"dp_replicate": world_size, "sp": 1}))
    attempt("cut later", lambda: prepared(model(), "megatron", {"dp_shard": world_size, "sp": 1}))
    attempt("fsdp", with_argument(fsdp="full_shard"))
    attempt("rebalanced", lambda: with_argument(train_sampling_strategy="batch_rebalance")().train())
    attempt("dispatched", dispatched)
    attempt("beside", beside)
    attempt("other seed", other_seed)
    attempt("dims", lambda: prepared(model(), "ulysses", {"sp": 1, "dp_shard": world_size}))
    attempt("no dim", lambda: prepared(model(), "ulysses", {"dp_shard": world_size}))
    attempt("not prepared", lambda: parallelism_config(model()))
    if find_spec("peft") is not None:
        attempt("adapters", adapters_around)
    with launched(0, 1):
        try:
            prepare(model(), "ulysses")
        except SPTransformError as error:
            messages["not launched"] = str(error)
    return messages
