"""Which kernel computes a block of attention: the first of ``TABLE`` that serves the case."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sptransform.ops.ring.kernels import cuda, varlen
from sptransform.ops.ring.kernels.cpu import flash, flash_backward, is_for_cpu
from sptransform.ops.ring.kernels.interface import Case, Kernel, Varlen
from sptransform.ops.ring.kernels.reference import OPEN

TABLE = (
    Kernel(
        "CPU flash",
        is_for_cpu,
        flash,
        flash_backward,
        widens=True,
    ),
    Kernel(
        "cuDNN",
        cuda.is_for_cudnn,
        cuda.cudnn,
        cuda.cudnn_backward,
    ),
    Kernel(
        "flash-attn",
        lambda case: cuda.is_plain(case) and cuda.has_flash_attn() and case.head_dim == case.value_dim,
        cuda.flash_attn,
        cuda.flash_attn_backward,
        varlen=Varlen(varlen.flash_attn, varlen.flash_attn_backward),
    ),
    Kernel(
        "CUDA flash",
        cuda.is_for_flash,
        cuda.flash,
        cuda.flash_backward,
        varlen=Varlen(varlen.flash, varlen.flash_backward),
    ),
    Kernel(
        "CUDA memory-efficient",
        cuda.is_efficient,
        cuda.efficient,
        cuda.efficient_backward,
        grouped=False,
    ),
    OPEN,
)


def choose(case: Case) -> Kernel:
    return next(kernel for kernel in TABLE if kernel.serves(case))


def has_windows(case: Case) -> bool:
    """Whether windows of a case without a mask are computed by a kernel that is as good as the case's own."""
    kernel = choose(replace(case, windowed=True))
    return kernel is not OPEN or kernel is choose(case)


def varlen_of(case: Case) -> Varlen | None:
    """The attention of pieces of sequences for the case; None if no kernel that serves it has one."""
    return next((kernel.varlen for kernel in TABLE if kernel.varlen is not None and kernel.serves(case)), None)


def kernel_name(
    query: Tensor,
    value: Tensor,
    *,
    masked: bool = False,
    explicit: bool = False,
    softcap: float = 0.0,
    varying: bool = False,
) -> str:
    """Which kernel computes the blocks of such an attention; tensors may be fake.

    ``masked``: for calls with a mask: those under a mask program that are not planned from data, and those on the edge
    of a sliding window if the kernel that computes the other calls has no windows. ``varying``: for calls that are
    planned from data.
    """
    return choose(Case.of(query, value, masked=masked, explicit=explicit, softcap=softcap, varying=varying)).name
