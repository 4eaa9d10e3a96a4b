"""Stand-ins for models without weights: to read a graph, shapes are enough."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# Private: the one tensor without memory that computes as if it were on a real device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from sptransform.parameters.modules import as_written

InputsT = TypeVar("InputsT")


def without_meta(model: nn.Module, inputs: InputsT) -> tuple[nn.Module, InputsT]:
    """``model`` and ``inputs`` as they are, or, where anything is on ``meta``, copies of fake CPU tensors.

    Meta tensors themselves are not enough: ``torch.tensor(..., device="meta")``, as caches call it, escapes the fake
    mode that Dynamo traces with, and the trace fails.
    """
    if not any(tensor.is_meta for tensor in _tensors(model, inputs)):
        return model, inputs
    return faked(model, inputs)


def faked(model: nn.Module, inputs: InputsT) -> tuple[nn.Module, InputsT]:
    """Copies of ``model`` and ``inputs`` with plain, full, fake tensors; on the CPU if any is on ``meta``."""
    tensors = _tensors(model, inputs)
    device = "cpu" if any(tensor.is_meta for tensor in tensors) else None
    mode = FakeTensorMode()
    # one stand-in per tensor, however many modules share it
    fakes = {id(tensor): _fake(tensor, mode, device) for tensor in tensors}
    stand_in = copy.deepcopy(model, dict(fakes))
    as_written(stand_in)
    return stand_in, pytree.tree_map(lambda x: fakes.get(id(x), x), inputs)


def _tensors(model: nn.Module, inputs: Any) -> list[Tensor]:
    passed = (x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
    return [*model.parameters(), *model.buffers(), *passed]


def _fake(tensor: Tensor, mode: FakeTensorMode, device: str | None) -> Any:
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)
