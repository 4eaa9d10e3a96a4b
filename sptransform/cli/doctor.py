"""`sptransform doctor`: what this installation can do, and which settings change results or speed. Nothing is run."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import metadata

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from sptransform.diagnostics import private_api
from sptransform.diagnostics.torch_version import check_torch_version
from sptransform.inspection.pages import Section
from sptransform.ops.ring.kernels.reference import OPEN
from sptransform.ops.ring.kernels.table import kernel_name

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEAD_DIMS = (64, 96, 128, 192, 256)


class Verdict(str, Enum):
    """What to make of a line: a problem stops something that users do."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    about: str
    verdict: Verdict
    found: str
    fix: str = ""


def checked() -> list[Line]:
    """All lines, by subject."""
    return [line for check in CHECKS for line in check()]


def sections(found: list[Line]) -> list[Section]:
    """The lines as a page, and what it comes to."""
    rows = [(line.about, line.verdict.value, line.found, line.fix) for line in found]
    counts = {verdict: sum(line.verdict is verdict for line in found) for verdict in Verdict}
    problems = counts[Verdict.PROBLEM]
    total = "No problems" if not problems else f"{problems} problem{'s' * (problems > 1)}"
    sentence = f"{total}, {counts[Verdict.NOTE]} notes, {counts[Verdict.OK]} ok."
    return [Section("What this installation can do", ("what", "verdict", "found", "fix"), rows, [sentence])]


def _torch() -> Iterator[Line]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_torch_version()  # one that is too old was refused when sptransform was imported
    range_ = next(
        (str(r.specifier) for r in _requirements("") if r.name == "torch"), "any: sptransform is not installed"
    )
    fix = "compare with one device first: sptransform verify" if said else ""
    yield Line("torch", Verdict.NOTE if said else Verdict.OK, f"{torch.__version__}, supported {range_}", fix)
    lost = private_api.missing()
    found = ", ".join(lost) or "all that are used are there"
    verdict = Verdict.PROBLEM if lost else Verdict.OK
    yield Line("private names of torch", verdict, found, f"pip install 'torch{range_}'" if lost else "")


def _devices() -> Iterator[Line]:
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"{number} x {torch.cuda.get_device_name()}" if number else "none: everything runs on the CPU"
    yield Line("GPUs", Verdict.OK if number else Verdict.NOTE, found)
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    yield Line("CPUs", Verdict.OK, f"{cpus}, {threads} threads in torch, {platform.machine()}")


def _kernels() -> Iterator[Line]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in DTYPES:
        by_kernel: dict[str, list[str]] = defaultdict(list)
        for dim in HEAD_DIMS:
            x = torch.empty(1, 1, 2, dim, dtype=dtype, device=device)
            by_kernel[kernel_name(x, x)].append(str(dim))
        found = "; ".join(f"{name} (heads of {', '.join(dims)})" for name, dims in by_kernel.items())
        is_slow = OPEN.name in by_kernel and dtype != torch.float64
        fix = "16 bits, or heads that a kernel serves: docs/gpu.md" if is_slow else ""
        name = str(dtype).removeprefix("torch.")
        yield Line(f"attention in {name}", Verdict.NOTE if is_slow else Verdict.OK, found, fix)


def _back_ends() -> Iterator[Line]:
    has_gpu = torch.cuda.is_available()
    needed = {"gloo": (dist.is_gloo_available(), True), "nccl": (dist.is_nccl_available(), has_gpu)}
    for name, (there, is_needed) in needed.items():
        verdict = Verdict.OK if there else Verdict.PROBLEM if is_needed else Verdict.NOTE
        found = "there" if there else "not in this torch" if is_needed else "not in this torch: for GPUs"
        fix = (
            ""
            if there
            else "a torch that is built with it; it is needed on GPUs"
            if name == "nccl"
            else "another torch"
        )
        yield Line(f"back end {name}", verdict, found, fix)
    ucc = dist.is_ucc_available()
    yield Line("back end ucc", Verdict.OK if ucc else Verdict.NOTE, "there" if ucc else "not in this torch: optional")
    try:
        socket.gethostbyname(socket.gethostname())
        resolves = True
    except OSError:
        resolves = "GLOO_SOCKET_IFNAME" in os.environ
    found = "gloo finds it" if resolves else "does not resolve, so that gloo may fail"
    fix = "" if resolves else "GLOO_SOCKET_IFNAME=lo on one machine, or the interface's name"
    yield Line("host name", Verdict.OK if resolves else Verdict.NOTE, found, fix)


def _compilers() -> Iterator[Line]:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    path = next((found for name in names if (found := shutil.which(name))), None)
    fix = "" if path else 'apt install g++, or conda install gxx; until then backend="aot_eager"'
    found = path or f"none of {', '.join(names)}: Inductor cannot compile for the CPU"
    yield Line("C++ compiler", Verdict.OK if path else Verdict.PROBLEM, found, fix)
    has_triton, needed = importlib.util.find_spec("triton") is not None, torch.cuda.is_available()
    verdict = Verdict.OK if has_triton else Verdict.PROBLEM if needed else Verdict.NOTE
    found = _version("triton") or ("there" if has_triton else "not installed; Inductor needs it on GPUs")
    yield Line("triton", verdict, found, "pip install triton" if verdict is Verdict.PROBLEM else "")


def _libraries() -> Iterator[Line]:
    """Optional ones, against what the extras of this package ask for."""
    asked = {r.name: r for extra in ("flash", "train") for r in _requirements(extra)}
    for name in ("flash-attn", "transformers", "accelerate", "trl", "peft", "diffusers"):
        version, wanted = _version(name), asked.get(name)
        if version is None:
            yield Line(name, Verdict.NOTE, "not installed: optional")
        elif wanted is not None and not wanted.specifier.contains(version, prereleases=True):
            yield Line(
                name,
                Verdict.PROBLEM,
                f"{version}, supported {wanted.specifier}",
                f"pip install '{name}{wanted.specifier}'",
            )
        else:
            yield Line(name, Verdict.OK, version)


def _settings() -> Iterator[Line]:
    import torch._inductor.config as inductor  # imported here because it is slow to import; see _micro_pipeline below

    deterministic = torch.are_deterministic_algorithms_enabled()
    fix = "slower: cuDNN computes no blocks of rings" if deterministic else ""
    yield Line("deterministic algorithms", Verdict.NOTE if deterministic else Verdict.OK, _on(deterministic), fix)
    precision = torch.get_float32_matmul_precision()
    exact = precision == "highest"
    fix = "" if exact else 'TF32; torch.set_float32_matmul_precision("highest") is exact'
    yield Line("float32 products", Verdict.OK if exact else Verdict.NOTE, precision, fix)
    # Private: the public way to say that gathers are to be fused with products
    pipelines = inductor._micro_pipeline_tp
    yield Line("micro-pipelined tensor parallelism", Verdict.OK, _on(pipelines))
    # Private: Dynamo's limits have no public name
    limits = torch._dynamo.config
    yield Line(
        "recompile limit",
        Verdict.OK,
        f"{limits.recompile_limit} a function, {limits.accumulated_recompile_limit} in all",
    )


def _environment() -> Iterator[Line]:
    """Variables that torch and its back ends read; first those that stop or slow something."""
    yield from told_by(os.environ)


def told_by(environment: Mapping[str, str]) -> Iterator[Line]:
    """A line for each variable that is set to something other than off."""
    for name, (verdict, fix) in VARIABLES.items():
        value = environment.get(name, "0")
        if value.lower() not in ("", "0", "off", "false", "info"):
            yield Line(name, verdict, value, fix)
    others = [name for name in sorted(environment) if name.startswith(PREFIXES) and name not in VARIABLES]
    if others:
        shown = ", ".join(f"{name}={environment[name]}" for name in others)
        yield Line("other variables", Verdict.NOTE, shown, "the same on all ranks")


PREFIXES = ("CUDA_", "GLOO_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "UCC_")
VARIABLES = {
    "TORCH_COMPILE_DISABLE": (Verdict.PROBLEM, "unset it: nothing is compiled, so no model is sharded"),
    "TORCHDYNAMO_DISABLE": (Verdict.PROBLEM, "unset it: nothing is compiled, so no model is sharded"),
    "CUDA_LAUNCH_BLOCKING": (Verdict.NOTE, "unset it: every kernel is waited for"),
    "NCCL_P2P_DISABLE": (Verdict.NOTE, "unset it: GPUs send through the host's memory"),
    "NCCL_IB_DISABLE": (Verdict.NOTE, "unset it: nodes send through sockets"),
    "NCCL_SHM_DISABLE": (Verdict.NOTE, "unset it: GPUs of a node send through sockets"),
    "NVIDIA_TF32_OVERRIDE": (Verdict.NOTE, "unset it: float32 products are computed in TF32, whatever torch says"),
    "TORCH_DISTRIBUTED_DEBUG": (Verdict.NOTE, "unset it: DETAIL compares ranks before each collective"),
}

CHECKS: tuple[Callable[[], Iterator[Line]], ...] = (
    _torch, _devices, _kernels, _back_ends, _compilers, _libraries, _settings, _environment,
)  # fmt: skip


def _requirements(extra: str) -> list[Requirement]:
    try:
        found = map(Requirement, metadata.requires("sptransform") or ())
    except metadata.PackageNotFoundError:  # a source tree on the path
        return []
    return [r for r in found if (r.marker is None if not extra else r.marker and r.marker.evaluate({"extra": extra}))]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _on(is_on: bool) -> str:
    return "on" if is_on else "off"
