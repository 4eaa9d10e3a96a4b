"""How long the transform takes, beside the compilation it is a part of, as a model gets deeper.

    python benchmarks/transform_time.py --layers 2 4 8 16 32

Method. Llamas of tiny width (time then depends on the number of nodes, not on arithmetic) are parallelized with
Ulysses over 4 ranks of torch's fake process group, which moves nothing, with backend aot_eager: the cheapest whole
compilation, hence the harshest comparison (`--backend inductor` is what users run; no compile cache is used, and all
of it is compiled in this process). One training step is timed on a fresh model after `torch._dynamo.reset()`, as
processor time of this process with one thread, since other processes must not count. Its parts:

- capture: Dynamo's graph to the ATen graph;
- passes: all passes, with the verifier after each of them;
- inner: the inner backend, AOTAutograd with it;
- rest: Dynamo before and after it, the backward where it is compiled when it runs, and the step itself.

The transform is capture and passes. Each depth is measured `--repeats` times after one warm-up at the smallest depth;
the run with the smallest whole is shown, all its parts from that one run. The fit is a least-squares line of the
transform over the number of layers; the scaling exponent is the slope between successive depths in log-log.
"""

import argparse
import cProfile
import math
import pstats
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from small_llama import small_llama
from torch.testing._internal.distributed.fake_pg import FakeStore

import sptransform
from sptransform.compiler import backend, rewrite

WORLD_SIZE = 4
BATCH, SEQ_LEN, WIDTH = 1, 64, 32
TARGET = 0.10  # of the whole

console = Console()


@dataclass(frozen=True)
class Times:
    """Seconds of one training step that compiles, and its parts."""

    layers: int
    nodes: int
    whole: float
    capture: float
    passes: float
    inner: float

    @property
    def transform(self) -> float:
        return self.capture + self.passes

    @property
    def rest(self) -> float:
        return self.whole - self.transform - self.inner


class Clock:
    """Adds up the time spent in functions it wraps; the profiler, if any, runs in there."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self.seconds = 0.0
        self.result: Any = None
        self._profile = profile

    def wrap(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                self.result = fn(*args, **kwargs)
            return self.result

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.process_time()
        if self._profile is not None:
            self._profile.enable()
        try:
            yield
        finally:
            if self._profile is not None:
                self._profile.disable()
            self.seconds += time.process_time() - start


def measure(num_layers: int, inner_backend: str, profile: cProfile.Profile | None = None) -> Times:
    torch._dynamo.reset()
    model = small_llama(num_layers, WIDTH, heads=4, vocabulary=64)
    sptransform.parallelize(model, "ulysses", backend=inner_backend)
    ids = torch.randint(64, (BATCH, SEQ_LEN))
    capture, passes, step = Clock(profile), Clock(profile), Clock()
    after: list[float] = []

    def rewritten(*args: Any) -> Any:
        result = rewrite_graph(*args)
        after.append(time.process_time())
        return result

    def inner(name: str) -> Callable[..., Any]:
        compile_ = lookup_backend(name)

        def run(*args: Any) -> Any:
            result = compile_(*args)
            after.append(time.process_time())
            return result

        return run

    rewrite_graph, lookup_backend = rewrite.rewrite_graph, backend.lookup_backend
    with (
        mock.patch.object(backend, "capture", capture.wrap(backend.capture)),
        mock.patch.object(backend, "run_passes", passes.wrap(backend.run_passes)),
        mock.patch.object(backend, "rewrite_graph", rewritten),
        mock.patch.object(backend, "lookup_backend", inner),
        torch._inductor.config.patch(force_disable_caches=True, compile_threads=1),
        step.running(),
    ):
        model(input_ids=ids, labels=ids).loss.backward()
    start, end = after
    return Times(num_layers, len(passes.result.graph.nodes), step.seconds, capture.seconds, passes.seconds, end - start)


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Intercept and slope of the least-squares line, and the largest relative distance of a point from it."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    intercept = mean_y - slope * mean_x
    return intercept, slope, max(abs(intercept + slope * x - y) / y for x, y in points)


def show(times: list[Times], inner_backend: str) -> None:
    setting = f"Llama, Ulysses, {WORLD_SIZE} ranks, {inner_backend}, torch {torch.__version__}"
    title = f"Transform time: {setting}; seconds of processor time"
    table = Table(title=title, title_justify="left")
    columns = ("layers", "nodes", "whole", "rest", "capture", "passes", "inner", "transform", "of the whole")
    for name in (*columns, "exponent"):
        table.add_column(name, justify="right")
    for before, t in zip([None, *times], times, strict=False):
        exponent = "" if before is None else f"{scaling_exponent(before, t):.2f}"
        seconds = (t.whole, t.rest, t.capture, t.passes, t.inner, t.transform)
        cells = [f"{x:.2f}" for x in seconds]
        table.add_row(str(t.layers), str(t.nodes), *cells, f"{t.transform / t.whole:.1%}", exponent)
    console.print(table)
    if len(times) > 2:
        intercept, slope, distance = fit([(t.layers, t.transform) for t in times])
        console.print(
            f"transform = {intercept:.3f} s + {slope * 1000:.1f} ms a layer; no point is further than {distance:.0%} "
            "from the line",
            highlight=False,
        )
    share = max(t.transform / t.whole for t in times)
    verdict = "met" if share <= TARGET else "missed"
    console.print(f"target, at most {TARGET:.0%} of the whole: {verdict} (largest share {share:.1%})", highlight=False)


def scaling_exponent(before: Times, after: Times) -> float:
    return math.log(after.transform / before.transform) / math.log(after.layers / before.layers)


def show_profile(num_layers: int, inner_backend: str) -> None:
    """Prints where the transform's time goes, by function."""
    profile = cProfile.Profile(time.process_time)
    measure(num_layers, inner_backend, profile)
    for order in ("cumulative", "tottime"):
        console.print(f"\nby {order}, {num_layers} layers:")
        pstats.Stats(profile, stream=console.file).strip_dirs().sort_stats(order).print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="default: %(default)s")
    parser.add_argument("--backend", default="aot_eager", help="inner backend (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--profile", type=int, metavar="LAYERS", help="profile the transform at this depth instead")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", message=".*force_disable_caches")  # disabling them is meant
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    measure(min(args.layers), args.backend)
    if args.profile is not None:
        show_profile(args.profile, args.backend)
    else:
        runs = [[measure(n, args.backend) for _ in range(args.repeats)] for n in sorted(args.layers)]
        show([min(own, key=lambda t: t.whole) for own in runs], args.backend)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
