"""What the GPU of this machine shows, as one JSON on standard output: `make gpu`.

Every block kernel against the definition; all strategies on pretended ranks with tensors on the device; Inductor, and
the comparison of replicas, on two gloo processes that share it; the kernels that `explain` names against those that
ran; the time of a ring's blocks beside one call over all keys. Without a GPU the same runs on the CPU, and says so.
Progress goes to standard error. The exit status is 1 if anything is wrong.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from ring_blocks import ring_blocks

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for the checks, which are tests

# the longest first
GROUPS = ("strategies in 32 and 64 bits", "strategies in 16 bits", "processes", "kernels", "names")
TIMES = "times"
TIMEOUT = {"cuda": 300, "cpu": 1200}  # seconds a group may take
MARK = "figures: "  # before what a group's process says on standard output; torch's profiler writes there too


def machine(device: str) -> dict[str, Any]:
    found = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        found |= {
            "name": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def run_group(name: str, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of one group, in this process, one after the other."""
    if name == TIMES:
        for row in ring_blocks(device):
            yield f"{row['length']} tokens, {row['ranks']} ranks, {row['direction']}", row
        return
    from tests.gpu.groups import GROUPS as CHECKS

    for check in CHECKS[name](device):
        start = time.perf_counter()
        yield check.name, check.figures() | {"seconds": round(time.perf_counter() - start, 1)}


def in_own_process(name: str, device: str, log: Callable[..., None]) -> dict[str, Any]:
    """A kernel that breaks the CUDA context, or hangs, takes no other group along."""
    command = [sys.executable, __file__, "--group", name, "--device", device]
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as process:
        timer = Timer(TIMEOUT[device], os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        for line in process.stdout:
            if line.startswith(MARK):
                check, figures = json.loads(line.removeprefix(MARK))
                found[check] = figures
                log(f"{name}: {check}: {len(figures.get('wrong', [])) or 'nothing'} wrong")
        status = process.wait()
        timer.cancel()
    if status:
        found["process"] = {"wrong": [f"it ended with status {status}; after {TIMEOUT[device]} s it is killed"]}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--group", choices=[*GROUPS, TIMES], help="only this group, in this process")
    args = parser.parse_args()
    if args.group:
        for found in run_group(args.group, args.device):
            print(MARK + json.dumps(found), flush=True)
        return 0
    console = Console(stderr=True)
    if args.device == "cpu":
        console.log("no CUDA device: the same checks run on the CPU")
    report: dict[str, Any] = {"machine": machine(args.device)}
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    workers = max(1, (os.cpu_count() or 2) // 4)
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task("groups", total=len(GROUPS) + 1)
        futures = {name: pool.submit(in_own_process, name, args.device, console.log) for name in GROUPS}
        for name, future in futures.items():
            report[name] = future.result()
            progress.advance(task)
        report[TIMES] = in_own_process(TIMES, args.device, console.log)  # alone on the device
        progress.advance(task)
    wrong = [f"{group}: {name}: {x}" for group in report for name, found in report[group].items()
             if isinstance(found, dict) for x in found.get("wrong", [])]  # fmt: skip
    report["wrong"] = wrong
    print(json.dumps(report, indent=2))
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
