"""A product of sorted rows with the matrices of their groups, in any dtype, as libraries register one."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "sptests.grouped_mm_fallback"


@torch.library.custom_op("sptests::grouped_mm_fallback", mutates_args=())
def grouped(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return torch.einsum("nk,nkf->nf", input, weight[_group_of(input, offs)])


@grouped.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2])


@torch.library.custom_op("sptests::grouped_backward", mutates_args=())
def grouped_backward(rows: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    group = _group_of(rows, ends)
    of_rows = torch.einsum("nf,nkf->nk", grad, weight[group])
    of_weight = torch.zeros_like(weight).index_add(0, group, rows[:, :, None] * grad[:, None, :])
    return of_rows, of_weight


@grouped_backward.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight)


def _group_of(rows: Tensor, ends: Tensor) -> Tensor:
    return torch.searchsorted(ends, torch.arange(rows.shape[0]), right=True).clamp(max=len(ends) - 1)


grouped.register_autograd(
    lambda ctx, grad: (*grouped_backward(*ctx.saved_tensors, grad), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
