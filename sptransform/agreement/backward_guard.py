"""Ranks agree before a backward as they do before a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def wrap_backward(outputs: Iterable[Any], inputs: Iterable[Any], around: Callable[[Callable[..., Any]], Any]) -> bool:
    """Wrap the backward of the compiled graph that made ``outputs`` with ``around``; returns whether there is one.

    Errors in a backward surface in the user's ``loss.backward()``, outside our calls. Private API: AOTAutograd
    makes one ``torch.autograd.Function`` class, ``CompiledFunction``, for each graph it compiles, and autograd looks up
    its ``backward`` at every call. Replacing it there affects this graph only.
    """
    before = {x.grad_fn for x in inputs if isinstance(x, torch.Tensor)}
    for x in outputs:
        node = x.grad_fn if isinstance(x, torch.Tensor) else None
        # an output that is a view has its own grad_fn, after that of the graph
        while node is not None and node not in before:
            function = getattr(node, "_forward_cls", None)
            if function is not None and function.__name__ == "CompiledFunction":
                function.backward = staticmethod(around(function.backward))
                return True
            node = node.next_functions[0][0] if node.next_functions else None
    return False
