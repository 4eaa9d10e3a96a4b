"""After `sptransform calibrate`: are the strategies predicted to be faster the faster ones, on this machine?

    python benchmarks/calibrated_order.py --ranks 2 4 --seq-len 512 2048

Method. The machine is measured as `sptransform calibrate` does, once for each number of ranks. Then a small Llama in
float32 is rewritten for every strategy, its step is simulated with these constants, op by op as `aot_eager` runs them,
and the same step is run by as many gloo processes, of one thread each: forward and backward, `--rounds` times after one
that compiles, the strategies in turn, so that what else the machine does falls on all of them. A time is that of the
slowest rank in the fastest round, for other work only adds to it; the median is printed beside it. No constant is taken
from these steps.

A pair is two strategies whose measured times differ by more than 15%. It is in order if the predicted ones do so too.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import combinations
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from small_llama import small_llama
from transformers import LlamaForCausalLM

import sptransform
from sptransform.cli.calibrate import calibrate
from sptransform.cost.hardware import Hardware
from sptransform.cost.read import step_of
from sptransform.cost.simulate import Timeline, simulate
from sptransform.planning.candidates import OF_SEQUENCES, Candidate, candidates
from sptransform.strategies.megatron import MegatronSP
from sptransform.testing.processes import on_processes

APART = 1.15  # of times, so that their order counts
TIMEOUT = 900.0
console = Console(width=110)


def llama(layers: int, hidden: int) -> LlamaForCausalLM:
    return small_llama(layers, hidden, heads=8, vocabulary=256, use_cache=False)


def inputs(seq_len: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(256, (1, seq_len), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def shown(num_ranks: int) -> list[Candidate]:
    return candidates((num_ranks,), (*OF_SEQUENCES, MegatronSP()))


def measured(
    rank: int, num_ranks: int, layers: int, hidden: int, seq_len: int, rounds: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Of each strategy and each round: seconds of the forward, and of the step."""
    given = inputs(seq_len)
    models = [
        sptransform.parallelize(llama(layers, hidden), each.strategy, backend="aot_eager") for each in shown(num_ranks)
    ]
    halves: list[list[float]] = [[] for _ in models]
    wholes: list[list[float]] = [[] for _ in models]
    for round_ in range(rounds + 1):
        for model, half, whole in zip(models, halves, wholes, strict=True):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            loss = model(**given).loss
            middle = time.perf_counter()
            loss.backward()
            end = time.perf_counter()
            if round_:  # the first one compiles
                half.append(middle - start)
                whole.append(end - start)
    return halves, wholes


def predicted(num_ranks: int, layers: int, hidden: int, seq_len: int, hardware: Hardware) -> list[Timeline]:
    model, given = llama(layers, hidden), inputs(seq_len)
    found = []
    for each in shown(num_ranks):
        rewritten = sptransform.rewrite(model, each.strategy, given, world_size=num_ranks)
        found.append(simulate(step_of(rewritten, fuse=False), hardware))
    return found


def compared(num_ranks: int, args: argparse.Namespace, seq_len: int, hardware: Hardware) -> tuple[int, int]:
    """Print one table; returns how many pairs are in order, and how many there are."""
    sizes = (args.layers, args.hidden, seq_len)
    timelines = predicted(num_ranks, *sizes, hardware)
    ranks = on_processes(num_ranks, measured, *sizes, args.rounds, timeout=TIMEOUT)
    rounds = [[_of_slowest([rank[part] for rank in ranks], n) for n in range(len(timelines))] for part in (0, 1)]
    forward, step = ([min(times) for times in part] for part in rounds)
    middle = [median(times) for times in rounds[1]]
    table = Table(title=f"{num_ranks} ranks, {seq_len} tokens: seconds of a step", title_justify="left")
    for name in ("strategy", "forward", "measured", "median", "predicted", "ratio", "computing", "exposed"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for n in sorted(range(len(step)), key=lambda n: step[n]):
        found = timelines[n]
        numbers = (forward[n], step[n], middle[n], found.seconds, found.seconds / step[n], found.compute_seconds)
        cells = [f"{x:.3f}" for x in (*numbers, found.exposed_seconds)]
        table.add_row(shown(num_ranks)[n].name, *cells)
    console.print(table)
    right = [
        (step[a] < step[b]) == (timelines[a].seconds < timelines[b].seconds)
        for a, b in combinations(range(len(step)), 2)
        if max(step[a], step[b]) > APART * min(step[a], step[b])
    ]
    console.print(f"pairs that differ by more than 15%, in order: {sum(right)} of {len(right)}\n", highlight=False)
    return sum(right), len(right)


def _of_slowest(ranks: Sequence[list[list[float]]], strategy: int) -> list[float]:
    """Seconds of each round."""
    return [max(times) for times in zip(*(rank[strategy] for rank in ranks), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: %(default)s")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048], help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    right = of = 0
    for num_ranks in args.ranks:
        hardware = calibrate(num_ranks)
        console.print(f"calibrated: {hardware.what}", highlight=False)
        for seq_len in args.seq_len:
            found = compared(num_ranks, args, seq_len, hardware)
            right, of = right + found[0], of + found[1]
    console.print(f"in all: {right} of {of} pairs in order", highlight=False)


if __name__ == "__main__":
    main()
