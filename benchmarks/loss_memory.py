"""What a training step holds at its peak for the logits of a long sequence, at once and in chunks.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --vocabulary 32000 --length 4096 --strategies ulysses megatron --chunks 256 none

Method. As benchmarks/memory.py: a Llama, here of one layer and a large vocabulary, runs one step on gloo ranks of one
thread each, through aot_eager; counted is every allocation. *largest* is the largest tensor that is made, *chunk x V*
the size of a chunk's float32 logits on a rank. *error* is how much the gradient that differs most from that of the
first row differs, against its largest entry.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from memory import Held, held, mebibytes
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import sptransform

console = Console()


@dataclass(frozen=True)
class Setting:
    strategy: str
    num_ranks: int
    length: int
    vocabulary: int
    hidden: int
    outputs: str
    chunk: int | str | None


def measure(rank: int, setting: Setting, store: str, answers: Any) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("sptransform").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=setting.num_ranks)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=2 * setting.hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=setting.length,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(setting.vocabulary, (1, setting.length))
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    sptransform.parallelize(
        model, setting.strategy, backend="aot_eager", outputs=setting.outputs, loss_chunk=setting.chunk
    )

    def step() -> None:
        model.zero_grad()
        model(**inputs).loss.backward()

    step()  # compiles
    found = held(step)
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(grads, f"{store}.grads")
    answers.put(found)
    dist.barrier()
    dist.destroy_process_group()


def whole(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def spawn(setting: Setting) -> tuple[Held, dict[str, Tensor]]:
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(measure, (setting, f"{directory}/store", answers), setting.num_ranks)
        grads = torch.load(f"{directory}/store.grads")
    ranks = [answers.get() for _ in range(setting.num_ranks)]
    return Held(max(x.peak for x in ranks), max(x.largest for x in ranks)), grads


def report(strategy: str, chunks: list[int | str | None], arguments: argparse.Namespace) -> None:
    title = f"{strategy}, {arguments.ranks} ranks, {arguments.length} tokens, {arguments.vocabulary} classes: MiB"
    table = Table(title=title, title_justify="left")
    for column in ("loss_chunk", "outputs", "peak", "largest", "chunk x V", "error"):
        table.add_column(column, justify="right")
    first: dict[str, Tensor] | None = None
    for chunk in chunks:
        for outputs in ("dtensor", "loss") if chunk is None else ("loss",):
            sizes = arguments.ranks, arguments.length, arguments.vocabulary, arguments.hidden
            found, grads = spawn(Setting(strategy, *sizes, outputs, chunk))
            first = first or grads
            error = max(float((grads[name] - x).abs().max() / x.abs().max()) for name, x in first.items())
            classes = arguments.vocabulary // (arguments.ranks if strategy == "megatron" else 1)
            of_chunk = mebibytes(4 * chunk * classes) if isinstance(chunk, int) else ""
            sizes = mebibytes(found.peak), mebibytes(found.largest)
            table.add_row(str(chunk), outputs, *sizes, of_chunk, f"{error:.0e}")
    console.print(table)


def a_chunk(text: str) -> int | str | None:
    return None if text == "none" else text if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of the logits of a training step.")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["ulysses"])
    parser.add_argument("--chunks", type=a_chunk, nargs="+", default=[None, "auto", 256])
    arguments = parser.parse_args()
    for strategy in arguments.strategies:
        report(strategy, arguments.chunks, arguments)


if __name__ == "__main__":
    main()
