"""How much memory a training step holds at its peak, on one device and on a rank, and the largest tensor it makes.

    python benchmarks/memory.py
    python benchmarks/memory.py --lengths 32768 --ranks 4 --strategies ulysses --masks padding

Method. A Llama of four layers without a cache runs one step, forward and backward, on gloo ranks of one thread each,
through aot_eager. Torch's profiler reports every allocation and every release on the CPU, those inside of ops included;
counted is what is held at the peak more than before the step, on the rank that holds most. Bytes are exact and do not
depend on the machine.

- *one device, sdpa*: the model as it is, without this library. It holds the masks that it makes, queries x keys.
- *one device, sptransform*: the model with `attn_implementation="sptransform"`, which makes no such mask.
- *N ranks*: the model as it is, parallelized. The share is N times the peak of a rank, as a part of the peak of the one
  device that makes no mask; 100% is perfect.

*square* is the largest allocation in bytes by the number of queries x keys: what falls with the length is no square.
The mask of a tile is among the allocations: 4 bytes for each of 512 x 1024 pairs, and in a long sequence for no more
pairs than the queries have numbers.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import sptransform
import sptransform.integrations.transformers

console = Console()

STRATEGIES = ("ulysses", "ring", "allgather", "usp", "megatron")
MASKS = ("causal", "padding", "packed", "window")
LAYERS, WINDOW = 4, 256
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1 << 20,
}


@dataclass(frozen=True)
class Setting:
    mask: str
    length: int
    strategy: str | None = None  # None: not parallelized
    num_ranks: int = 1
    attention: str = "sdpa"


@dataclass(frozen=True)
class Held:
    """Bytes held at the peak more than before, and of the largest allocation."""

    peak: int
    largest: int


def held(step: Any) -> Held:
    """What ``step`` holds."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return Held(peak, max(sizes))


def model_and_inputs(setting: Setting) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    if setting.mask == "window":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.set_attn_implementation(setting.attention)
    ids = torch.randint(SIZES["vocab_size"], (1, setting.length))
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    if setting.mask == "padding":
        inputs["attention_mask"] = (torch.arange(setting.length) < setting.length * 7 // 8).long()[None]
    if setting.mask == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(setting.length // 4)] * 4)[None]
    return model, inputs


def measure(rank: int, setting: Setting, store: str, answers: Any) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("sptransform").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=setting.num_ranks)
    model, inputs = model_and_inputs(setting)
    if setting.strategy is not None:
        sptransform.parallelize(model, setting.strategy, backend="aot_eager")

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad()

    step()  # compiles
    answers.put(held(step))
    dist.barrier()
    dist.destroy_process_group()


def spawn(setting: Setting) -> Held:
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(measure, (setting, f"{directory}/store", answers), setting.num_ranks)
    ranks = [answers.get() for _ in range(setting.num_ranks)]
    return Held(max(x.peak for x in ranks), max(x.largest for x in ranks))


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


def report(mask: str, length: int, strategies: list[str], rank_counts: list[int]) -> None:
    table = Table(title=f"{mask}, {length} tokens: MiB at the peak", title_justify="left")
    for column in ("", "peak", "share", "largest", "square"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, found: Held, share: str = "") -> None:
        table.add_row(
            name, mebibytes(found.peak), share, mebibytes(found.largest), f"{found.largest / length**2:.2f}"
        )

    row("one device, sdpa", spawn(Setting(mask, length)))
    whole = spawn(Setting(mask, length, attention="sptransform"))
    row("one device, sptransform", whole)
    for strategy in strategies:
        for count in rank_counts:
            found = spawn(Setting(mask, length, strategy, count))
            row(f"{strategy}, {count} ranks", found, f"{found.peak * count / whole.peak:.0%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a training step.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    arguments = parser.parse_args()
    for length, mask in product(arguments.lengths, arguments.masks):
        report(mask, length, arguments.strategies, arguments.ranks)


if __name__ == "__main__":
    main()
