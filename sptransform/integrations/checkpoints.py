"""Checkpoints of models of which ranks keep parts, in the form that the plain model's have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def keeps_parts(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def whole_state(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` with whole tensors, on the CPU. All ranks call it. Tied parameters stay one tensor."""
    seen: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    return {name: _once(seen, x) if isinstance(x, Tensor) else x for name, x in state.items()}


@torch.no_grad()
def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole tensors, on the CPU. All ranks call it."""
    return _whole(optimizer.state_dict())


def takes_whole_states(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` also take whole tensors for the parameters of which ranks keep parts."""
    model.register_load_state_dict_pre_hook(_cut)


def _cut(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:
    for name, own in module.state_dict(keep_vars=True).items():
        if isinstance(own, DTensor) and isinstance(state.get(name), Tensor):
            state[name] = part_like(own, state[name])


def optimizer_parts(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of whole tensors, as of one process, with this rank's parts for parameters of which it keeps parts."""
    owners = {
        index: parameter
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
        for index, parameter in zip(saved["params"], own["params"], strict=True)
    }
    parts = {index: _like(owners[index], values) for index, values in state["state"].items()}
    return {**state, "state": parts}


@torch.no_grad()
def part_like(own: DTensor, whole: Tensor) -> Tensor:
    """This rank's part of ``whole``, cut as ``own`` is; as it is, if it has another shape or is in parts already."""
    if isinstance(whole, DTensor) or whole.shape != own.shape:
        return whole
    whole = whole.to(own.device)
    # each rank has all of it, so nothing is sent
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def _like(parameter: Tensor, values: Any) -> Any:
    if not isinstance(parameter, DTensor):
        return values
    return {name: part_like(parameter, x) if isinstance(x, Tensor) else x for name, x in values.items()}


def _once(seen: dict[int, Tensor], x: Tensor) -> Tensor:
    if id(x) not in seen:
        seen[id(x)] = _whole(x.detach())
    return seen[id(x)]


def _whole(x: Any) -> Any:
    if isinstance(x, DTensor):
        x = x.full_tensor()
    if isinstance(x, Tensor):
        return x.cpu()
    if isinstance(x, Mapping):
        return {key: _whole(value) for key, value in x.items()}
    return type(x)(map(_whole, x)) if isinstance(x, list | tuple) else x
