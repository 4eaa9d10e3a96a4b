"""How long attention takes on a sharded sequence, beside public implementations, and what a second rank gains.

    pip install deepspeed yunchang ring-flash-attn  # or some of them, or none
    python benchmarks/attention.py

Method. Causal attention alone, forward and backward, in float32, on gloo ranks of one thread each. A rank is given its
shards of q, k, v and of the output's gradient as ``[batch, tokens, heads, head_dim]``, as projections leave them, and
must return its shards of the output and of the three gradients so; whoever wants another order of dimensions transposes
on the clock. Each implementation gets the tokens that it asks for, dealt beforehand.

All take turns in the same processes: a round runs each once, in an order drawn anew, after a barrier. A time is the
longest over the ranks. Shown are its median over the rounds, its range, and the processor time of all ranks together,
which other work on the machine disturbs least. A ratio is the median of the ratios round by round. Where a goal is
judged, those of the best rounds and of processor time stand beside it: they disagree when the machine was not quiet.
Each has run twice before, once to compare its results with those of one device.

1. `--ranks` ranks, ours beside others. *ring*: queries stay; keys and values come, in turn or (all-gather) all at once.
   *ulysses*: heads are exchanged for tokens. *floor*: nothing is sent, each rank is given whole heads. Who is not
   installed, cannot run on a CPU or is wrong has that said instead of a time.
2. Two ranks beside one, on a longer sequence.
"""

import argparse
import contextlib
import io
import math
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attention_variants import BESIDE_ONE, BESIDE_OTHERS, OURS, Setting, Variant, sdpa
from rich.console import Console
from rich.table import Table
from torch import Tensor

TOLERANCE = 1e-5  # largest difference from one device, as a part of the largest entry
GOAL_RATIO = 1.0  # ours / the best of its kind
GOAL_SPEEDUP = 1.9  # two ranks, one thread each

console = Console()


@dataclass(frozen=True)
class Result:
    """Of each round the longest of the ranks' ``seconds`` and the sum of their processor times, ``work``.

    ``difference`` is from one device, as a part of the largest entry; ``error`` says why there are no rounds.
    """

    seconds: list[float]
    work: list[float]
    difference: float
    error: str | None

    @property
    def right(self) -> bool:
        return self.error is None and self.difference <= TOLERANCE

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_work(self) -> float:
        return statistics.median(self.work)


# ---- measuring, on every rank


def part_of(layout: str, setting: Setting, rank: int) -> Callable[[Tensor], Tensor] | None:
    """What this rank is given of ``[batch, seq_len, heads, head_dim]``; None: it only waits."""
    num, size = setting.ranks, setting.seq_len
    if layout == "first":
        return (lambda x: x) if rank == 0 else None
    if layout == "heads":
        return lambda x: x.chunk(num, 2)[rank].contiguous()
    if layout == "contiguous":
        return lambda x: x.chunk(num, 1)[rank].contiguous()
    assert layout == "zigzag" and size % (2 * num) == 0, layout
    return lambda x: torch.cat([x.chunk(2 * num, 1)[i] for i in (rank, 2 * num - 1 - rank)], 1)


class Runner:
    """One variant on this rank; every rank calls the same. What goes wrong on any is the ``error`` of all of them."""

    def __init__(
        self, variant: Variant, setting: Setting, whole: list[Tensor], expected: list[Tensor], control: Any
    ) -> None:
        self._variant, self._setting, self._control = variant, setting, control
        self._part = part_of(variant.layout, setting, dist.get_rank())
        if self._part is not None:
            *qkv, self._grad = (self._part(x) for x in whole)
            self._qkv = [x.requires_grad_() for x in qkv]
        self._group = dist.new_group(timeout=timedelta(seconds=60))
        self._rounds: list[tuple[float, float]] = []
        self.difference = 0.0
        self.error: str | None = None
        self._guarded(lambda: self._prepare(expected))
        self._guarded(self.run)
        self._rounds = []

    @property
    def right(self) -> bool:
        return self.error is None and self.difference <= TOLERANCE

    def run(self) -> None:
        dist.barrier(self._control)
        start, start_work = time.perf_counter(), time.process_time()
        if self._part is not None:
            self._step()
        self._rounds.append((time.perf_counter() - start, time.process_time() - start_work))

    def result(self) -> Result:
        rounds = list(zip(*self._of_ranks(self._rounds), strict=True))
        seconds = [max(seconds for seconds, _ in ranks) for ranks in rounds]
        return Result(seconds, [sum(work for _, work in ranks) for ranks in rounds], self.difference, self.error)

    def _step(self) -> list[Tensor]:
        out = self._attention(*self._qkv)
        return [out, *torch.autograd.grad(out, self._qkv, self._grad)]

    def _prepare(self, expected: list[Tensor]) -> None:
        self._attention = self._variant.make(self._setting, self._group)
        if self._part is None:
            return
        for found, whole in zip(self._step(), expected, strict=True):
            difference = (found - self._part(whole)).abs().max() / whole.abs().max()
            self.difference = max(self.difference, difference.nan_to_num(math.inf).item())

    def _guarded(self, act: Callable[[], None]) -> None:
        if self.error is not None:
            return
        error = None
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                act()
            except Exception as e:
                error = f"{type(e).__name__}: {e}".splitlines()[0].split(". ")[0][:160]
        errors, differences = zip(*self._of_ranks((error, self.difference)), strict=True)
        self.error, self.difference = next(filter(None, errors), None), max(differences)

    def _of_ranks(self, own: Any) -> list[Any]:
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, own, group=self._control)
        return results


def measure(rank: int, setting: Setting, variants: list[Variant], store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=setting.ranks)
    # the default group may hold what a variant that failed had begun to send
    control = dist.new_group()
    torch.manual_seed(0)
    shape = (setting.batch, setting.seq_len, setting.heads, setting.head_dim)
    whole = [torch.randn(shape) for _ in range(4)]
    expected = [torch.empty(shape) for _ in range(4)]
    if rank == 0:
        qkv = [x.clone().requires_grad_() for x in whole[:3]]
        out = sdpa(*qkv)
        expected = [x.detach().contiguous() for x in (out, *torch.autograd.grad(out, qkv, whole[3]))]
    for x in expected:
        dist.broadcast(x, 0)
    runners = [Runner(variant, setting, whole, expected, control) for variant in variants]
    running = [runner for runner in runners if runner.right]
    order = random.Random(0)  # the same on every rank
    for _ in range(setting.rounds):
        for runner in order.sample(running, len(running)):
            runner.run()
    results = [runner.result() for runner in runners]
    if rank == 0:
        answers.put(results)
    dist.barrier(control)


def run(setting: Setting, variants: list[Variant]) -> list[Result]:
    """A result each. Those that are right are timed in new processes, without the others.

    What a variant that failed had begun to send keeps gloo's threads busy to the end of the process.
    """
    results = spawn(replace(setting, rounds=0), variants)
    right = [i for i, result in enumerate(results) if result.right]
    for i, result in zip(right, spawn(setting, [variants[i] for i in right]), strict=True):
        results[i] = result
    return results


def spawn(setting: Setting, variants: list[Variant]) -> list[Result]:
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(measure, (setting, variants, f"{directory}/store", answers), setting.ranks)
    return answers.get()


# ---- showing


def ratio(a: Result, b: Result) -> float:
    """a / b, round by round."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def other_ratios(a: Result, b: Result, ranks: int = 1) -> str:
    """What to hold :func:`ratio` against; ``ranks`` is how many b's work is spread over, where a's is on one."""
    best, work = min(a.seconds) / min(b.seconds), a.median_work / (b.median_work / ranks)
    return f"best rounds {best:.2f}, processor time {work:.2f}"


def show(
    title: str, setting: Setting, rows: list[tuple[Variant, Result]], compared: dict[str, Result], name: str
) -> None:
    """A row each; the last column, ``name``, is ``compared[kind]``'s time / the row's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shape = f"B={setting.batch}, S={setting.seq_len}, H={setting.heads}, D={setting.head_dim}, float32, causal"
    console.print(
        f"\n{title}: {setting.ranks} gloo ranks of one thread on {cores} cores; {shape}, forward + backward; "
        f"{setting.rounds} rounds; torch {torch.__version__}",
        highlight=False,
    )
    table = Table()
    for column in ("kind", "implementation", "seconds", "range", "processor s", "difference", name):
        table.add_column(column, justify="left" if column in ("kind", "implementation") else "right")
    for i, (variant, result) in enumerate(rows):
        if i and variant.kind != rows[i - 1][0].kind:
            table.add_section()
        if result.error is not None:
            table.add_row(variant.kind, variant.label, *"-----")
            continue
        if not result.right:
            table.add_row(variant.kind, variant.label, *"---", f"[bold red]WRONG {result.difference:.0e}[/]", "-")
            continue
        base = compared.get(variant.kind, result)
        table.add_row(
            variant.kind,
            variant.label,
            f"{result.median:.3f}",
            f"{min(result.seconds):.3f}-{max(result.seconds):.3f}",
            f"{result.median_work:.2f}",
            f"{result.difference:.0e}",
            f"{ratio(base, result):.2f}" if base is not result else "",
        )
    console.print(table)
    for variant, result in rows:
        if result.error is not None:
            console.print(f"did not run: {variant.label}: {result.error}", highlight=False, markup=False)


def compare(setting: Setting) -> None:
    """Part 1."""
    rows = list(zip(BESIDE_OTHERS, run(setting, BESIDE_OTHERS), strict=True))
    ran = [(variant, result) for variant, result in rows if result.right]
    ours = [(variant, result) for variant, result in ran if variant.owner == OURS]
    # the first of a kind stands for it
    show("Beside others", setting, rows, {v.kind: r for v, r in reversed(ours)}, "ours / it")
    for variant, result in ours:
        peers = [(v, r) for v, r in ran if v.kind == variant.kind and v.owner != OURS]
        if peers:
            best, best_result = min(peers, key=lambda peer: peer[1].median)
            found = ratio(result, best_result)
            verdict = "met" if found <= GOAL_RATIO else "missed"
            console.print(
                f"{variant.label}: {found:.2f} of the time of the best peer of its kind, {best.label} "
                f"({other_ratios(result, best_result)}); "
                f"goal, at most {GOAL_RATIO:.2f}: {verdict}",
                highlight=False,
            )


def scale(setting: Setting) -> None:
    """Part 2."""
    rows = list(zip(BESIDE_ONE, run(setting, BESIDE_ONE), strict=True))
    alone = {variant.kind: result for variant, result in reversed(rows)}
    show("Two ranks beside one", setting, rows, alone, "speed-up")
    (_, one), (_, two) = rows[2:]
    if not (one.right and two.right):
        return
    found = ratio(one, two)
    verdict = "met" if found >= GOAL_SPEEDUP else "missed"
    console.print(
        f"speed-up of the ring: {found:.2f} ({other_ratios(one, two, 2)}); goal, at least {GOAL_SPEEDUP}: {verdict}",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("batch", 1, ""),
        ("heads", 8, ""),
        ("head-dim", 64, ""),
        ("ranks", 4, "of part 1; "),
        ("seq-len", 4096, "of part 1; "),
        ("rounds", 15, "of part 1, 0 to skip it; "),
        ("long-seq-len", 8192, "of part 2; "),
        ("long-rounds", 5, "of part 2, 0 to skip it; "),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what}default: %(default)s")
    args = parser.parse_args()
    shape = args.batch, args.heads, args.head_dim
    if args.rounds:
        compare(Setting(*shape, args.seq_len, args.ranks, args.rounds))
    if args.long_rounds:
        scale(Setting(*shape, args.long_seq_len, 2, args.long_rounds))


if __name__ == "__main__":
    main()
