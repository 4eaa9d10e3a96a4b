"""Attention on a sharded sequence by whom it is measured: ours, and public implementations that may be installed.

Each is a function ``(setting, process_group) -> attention``. It imports what it needs, which may fail.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import sptransform.ops  # noqa: F401 - registers torch.ops.sptransform

OURS = "ours"

# [batch, tokens, heads, head_dim] each -> the output, the same
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    batch: int
    heads: int
    head_dim: int
    seq_len: int
    ranks: int
    rounds: int


@dataclass(frozen=True)
class Variant:
    """``layout`` is how tokens, or heads, are dealt to the ranks; 'first' gives rank 0 everything."""

    kind: str
    owner: str
    name: str
    layout: str
    make: Callable[[Setting, dist.ProcessGroup], Attention]

    @property
    def label(self) -> str:
        return f"{self.owner}: {self.name}"


# ---- one device, and ranks that send nothing


def one_device(setting: Setting, group: dist.ProcessGroup) -> Attention:
    return sdpa


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


# ---- ours


def our_ring(keys_travel: bool, setting: Setting, group: dist.ProcessGroup) -> Attention:
    ops, name = torch.ops.sptransform, group.group_name
    own = f"{setting.seq_len}/{setting.ranks}z"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not keys_travel:
            k, v = ops.all_gather_packed([k, v], [f"S(2:{own})"] * 2, name)
        keys = own if keys_travel else ""
        out = ops.ring_attention(q, k, v, [], [], nearest=0, queries=own, keys=keys, group_name=name)[0]
        return out.transpose(1, 2)

    return run


def our_attention_alone(setting: Setting, group: dist.ProcessGroup) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.ops.sptransform.ring_attention(q, k, v, [], [], nearest=0)[0].transpose(1, 2)

    return run


def our_ulysses(setting: Setting, group: dist.ProcessGroup) -> Attention:
    tokens, heads = f"S(2:{setting.seq_len}/{setting.ranks})", f"S(1:{setting.heads}/{setting.ranks})"
    all_to_all = torch.ops.sptransform.all_to_all

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        xs = [x.transpose(1, 2) for x in (q, k, v)]
        q, k, v = all_to_all(xs, [tokens] * 3, [heads] * 3, group.group_name)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return all_to_all([out], [heads], [tokens], group.group_name)[0].transpose(1, 2)

    return run


# ---- others: ring


def torch_ring(rotate: str, setting: Setting, group: dist.ProcessGroup) -> Attention:
    """Torch's ring template with the CPU's flash kernel: the template takes the kernel as an argument."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cp.set_rotate_method(rotate)
            out, lse = cp._templated_ring_attention(group, 2, kernel, q, k, v, is_causal=True)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            tensors = (grad, "grad_out", *ctx.saved_tensors)
            return cp._templated_ring_attention_backward(
                group, 2, kernel_backward, *tensors, is_causal=True, dropout_p=0.0
            )

    return lambda *qkv: Ring.apply(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def torch_context_parallel(setting: Setting, group: dist.ProcessGroup) -> Attention:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = DeviceMesh.from_group(group, "cpu")
    name, original = "scaled_dot_product_attention", F.scaled_dot_product_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # torch 2.11 leaves its replacement in place
        replaced = mock.patch.object(F, name, original)
        with replaced, context_parallel(mesh, buffers=[torch.zeros(2 * setting.ranks)], buffer_seq_dims=[0]):
            return sdpa(q, k, v)

    return run


def yunchang_zigzag(setting: Setting, group: dist.ProcessGroup) -> Attention:
    from yunchang import zigzag_ring_flash_attn_func
    from yunchang.kernels import AttnType

    options = {"causal": True, "group": group, "attn_type": AttnType.TORCH_FLASH}
    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, **options)


def yunchang_torch(setting: Setting, group: dist.ProcessGroup) -> Attention:
    from yunchang import ring_pytorch_attn_func

    return lambda q, k, v: ring_pytorch_attn_func(q, k, v, causal=True, group=group)


def ring_flash_attn(setting: Setting, group: dist.ProcessGroup) -> Attention:
    from ring_flash_attn import zigzag_ring_flash_attn_func

    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=group)


# ---- others: Ulysses


def deepspeed_ulysses(setting: Setting, group: dist.ProcessGroup) -> Attention:
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    attention = DistributedAttention(sdpa, group, scatter_idx=2, gather_idx=1)
    return lambda q, k, v: attention(q, k, v, batch_dim_idx=0)


def yunchang_ulysses(setting: Setting, group: dist.ProcessGroup) -> Attention:
    from yunchang import UlyssesAttention
    from yunchang.kernels import AttnType

    attention = UlyssesAttention(group, attn_type=AttnType.TORCH_FLASH)
    attention.attn_fn = lambda q, k, v, **options: sdpa(q, k, v)  # its own are CUDA's
    return lambda q, k, v: attention(q, k, v, causal=True)


BESIDE_OTHERS = [
    Variant("floor", "torch", "SDPA of whole heads, nothing sent", "heads", one_device),
    Variant("ring", OURS, "ring, zigzag", "zigzag", partial(our_ring, True)),
    Variant("ring", OURS, "all-gather, zigzag", "zigzag", partial(our_ring, False)),
    Variant("ring", "torch", "ring template, zigzag, all-to-all rotation", "zigzag", partial(torch_ring, "alltoall")),
    Variant("ring", "torch", "ring template, zigzag, all-gather rotation", "zigzag", partial(torch_ring, "allgather")),
    Variant("ring", "torch", "context_parallel", "zigzag", torch_context_parallel),
    Variant("ring", "yunchang", "zigzag ring, AttnType.TORCH_FLASH", "zigzag", yunchang_zigzag),
    Variant("ring", "yunchang", "ring_pytorch_attn", "contiguous", yunchang_torch),
    Variant("ring", "ring-flash-attn", "zigzag ring", "zigzag", ring_flash_attn),
    Variant("ulysses", OURS, "packed all-to-all, SDPA", "contiguous", our_ulysses),
    Variant("ulysses", "deepspeed", "DistributedAttention, SDPA", "contiguous", deepspeed_ulysses),
    Variant("ulysses", "yunchang", "UlyssesAttention, SDPA", "contiguous", yunchang_ulysses),
]

BESIDE_ONE = [
    Variant("nothing sent", "torch", "one rank, SDPA", "first", one_device),
    Variant("nothing sent", "torch", "two ranks, SDPA of half of the heads each", "heads", one_device),
    Variant("ring", OURS, "one rank", "first", our_attention_alone),
    Variant("ring", OURS, "two ranks, zigzag", "zigzag", partial(our_ring, True)),
]
