"""A rank's steps as a graph, traced from the code that runs: hops, waits, blocks and merges are nodes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from sptransform.ops.communication.steps import COMMUNICATING, Start, drive, group_of
from sptransform.ops.ring.schedule import backward_steps, forward_steps
from sptransform.ops.ring.sums import AS_NODES

# as they are traced; the others of COMMUNICATING write into none of their tensors
_STEPS = {
    "ring_attention": partial(forward_steps, sums=AS_NODES),
    "ring_attention_backward": partial(backward_steps, sums=AS_NODES),
}


def trace_steps(name: str, rank: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """What ``rank`` does in a call of an op that communicates in steps, such as ``ring_attention``.

    Args:
        name: of the op.
        args, kwargs: the call's arguments. Tensors have this rank's sizes and may be fake; nothing is computed.

    Returns:
        A graph without in-place ops. Inputs are the call's tensors, in order; sizes and ranks are those of ``rank``.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    mode = detect_fake_mode(tensors) or FakeTensorMode()
    group = group_of(name, args, kwargs)
    c10d = torch.ops._c10d_functional

    def start(asked: Start) -> Tensor:
        return c10d.all_to_all_single(asked.x, asked.received, asked.sent, group)

    def run(*tensors: Tensor) -> Any:
        traced = iter(tensors)
        filled = [next(traced) if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        steps = {**COMMUNICATING, **_STEPS}[name](rank, *args, **kwargs)
        return drive(steps, start, c10d.wait_tensor)

    with mode, torch.no_grad():
        gm = make_fx(run)(*(mode.from_tensor(x) for x in tensors))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm
