"""A rank's steps as a graph, traced from the code that runs: hops, waits, blocks and merges are nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from sptransform.ops.communication.steps import Start, drive
from sptransform.ops.ring.schedule import backward_steps, forward_steps
from sptransform.ops.ring.sums import AS_NODES

_STEPS = {"ring_attention": forward_steps, "ring_attention_backward": backward_steps}


def trace_steps(name: str, rank: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """What ``rank`` does in a call of ``ring_attention`` or ``ring_attention_backward``.

    Args:
        name: which of the two.
        args, kwargs: the call's arguments. Tensors have this rank's sizes and may be fake; nothing is computed.

    Returns:
        A graph without in-place ops. Inputs are the call's tensors, in order; sizes and ranks are those of ``rank``.
    """
    leaves, spec = pytree.tree_flatten(args)
    tensors = [x for x in leaves if x is not None]  # there may be no sinks
    mode = detect_fake_mode(tensors) or FakeTensorMode()
    group = kwargs.get("group_name", "")
    c10d = torch.ops._c10d_functional

    def start(asked: Start) -> Tensor:
        return c10d.all_to_all_single(asked.x, asked.received, asked.sent, group)

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        arguments = pytree.tree_unflatten([None if x is None else next(given) for x in leaves], spec)
        steps = _STEPS[name](rank, *arguments, sums=AS_NODES, **kwargs)
        return drive(steps, start, c10d.wait_tensor)

    with mode, torch.no_grad():
        gm = make_fx(run)(*(mode.from_tensor(x) for x in tensors))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm
