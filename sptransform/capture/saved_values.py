"""Which ops keep a tensor for their backward: a write that autograd does not see would change it there."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.autograd.graph import saved_tensors_hooks

from sptransform.graph import dataflow, notes
from sptransform.rules.rule import map_nodes


def keeper_of(tensor: fx.Node, last: fx.Node) -> fx.Node | None:
    """An op up to ``last`` whose backward reads ``tensor``, or a view of it; None if there is none."""
    views, memory = [tensor], storages(tensor)
    if tensor.op == "call_function" and memory & _kept(tensor) and _is_reached(tensor):
        return tensor  # its own result, as of `exp`
    for view in views:
        for user in view.users:
            if user <= last and user.op == "call_function" and user not in views:
                if memory & storages(user):
                    views.append(user)
                elif memory & _kept(user) and _is_reached(user):
                    return user
    return None


def _is_reached(node: fx.Node) -> bool:
    """Whether a backward comes to the node: not if nothing but what has no gradient is computed from it."""
    waiting, found = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output" or dataflow.writes(user):
                return True
            if notes.note(user).differentiable and user not in found:
                found.add(user)
                waiting.append(user)
    return False


def storages(node: fx.Node) -> set[int]:
    return {value.untyped_storage()._cdata for value in dataflow.values(node)}


def _kept(node: fx.Node) -> set[int]:
    """The memory of the node's operands and results that its backward reads."""
    if not dataflow.is_op(node.target) or not notes.region_of(node).grad_enabled:
        return set()
    kept: set[int] = set()
    own: dict[int, int] = {}  # memory of a result here -> that of the node's

    def note_kept(x: torch.Tensor) -> torch.Tensor:
        kept.add(x.untyped_storage()._cdata)
        return x

    def fake(x: Any) -> Any:
        value = dataflow.value(x)
        return value.detach().requires_grad_() if notes.note(x).differentiable else value

    with dataflow.fake_mode(node.graph), torch.enable_grad(), notes.region_of(node).autocast():
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda x: fake(x) if isinstance(x, fx.Node) else x)
        with saved_tensors_hooks(note_kept, lambda x: x):
            results = node.target(*args, **kwargs)
    results = results if isinstance(results, list | tuple) else [results]
    for here, there in zip(results, dataflow.values(node), strict=False):
        if isinstance(here, torch.Tensor):
            own[here.untyped_storage()._cdata] = there.untyped_storage()._cdata
    return {own.get(memory, memory) for memory in kept}
