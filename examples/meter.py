"""What the training examples share: the processes, the text that `--tiny` trains on, and a progress bar.

The bar shows the loss, tokens per second, and the peak memory of one rank: of its GPU, or of its process.
"""

import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

TEXT = Path(__file__).with_name("declaration.txt")  # the US Declaration of Independence, public domain


def start() -> torch.device:
    """Join the processes that torchrun started; the device of this rank."""
    if "RANK" not in os.environ:
        raise SystemExit("start this script by torchrun: torchrun --nproc-per-node 2 SCRIPT --tiny")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def tokens(length: int, number: int, offset: int = 0) -> torch.Tensor:
    """`number` windows of `length` bytes of the text, from the `offset`-th on, starting over at the end."""
    text = torch.tensor(list(TEXT.read_bytes()))
    starts = ((offset + torch.arange(number)) * length) % (len(text) - length)
    return torch.stack([text[at : at + length] for at in starts.tolist()])


class Meter:
    """A progress bar on the first rank, advanced by `step`."""

    def __init__(self, steps: int, start: int = 0) -> None:
        columns = TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=Console(quiet=dist.get_rank() != 0))
        self._task = self._bar.add_task("", total=steps, completed=start)
        self._first, self._tokens, self._began = True, 0, 0.0

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, tokens: int, **shown: float) -> None:
        """`tokens`: of all ranks in this step. The first step, which compiles, is not counted."""
        if self._first:
            self._first, self._began = False, time.perf_counter()
        else:
            self._tokens += tokens
        speed = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        figures = [f"{name} {value:.4f}" for name, value in shown.items()]
        text = "  ".join([*figures, f"{speed:,.0f} tokens/s", f"peak {peak_memory():,.0f} MiB"])
        self._bar.update(self._task, advance=1, description=text)


def peak_memory() -> float:
    """MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
