"""Autocast and grad-mode regions: what is in force where a node stands in its graph.

Both are nodes of the captured graph. Autocast regions nest, each with a node that enters and one that leaves it. Grad
mode is a switch: leaving an inner ``no_grad`` inside an outer one sets it to False once more, so counting its nodes
would say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

# Private: the calls that regions are in a traced graph; torch has no public name for them.
from torch._C import _set_grad_enabled
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


@dataclass(frozen=True)
class Region:
    """What is in force at one place of a graph; by default what is around the whole of it.

    Attributes:
        autocasts: the arguments of ``torch.autocast`` for every open region, outermost first.
        grad_enabled: whether autograd records.
    """

    autocasts: tuple[tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]], ...] = ()
    grad_enabled: bool = True

    def after(self, node: fx.Node) -> Region:
        """What is in force behind ``node``, which stands in this region."""
        if node.target is _enter_autocast:
            entered = node.args, tuple(sorted(node.kwargs.items()))
            return replace(self, autocasts=(*self.autocasts, entered))
        if node.target is _exit_autocast:
            return replace(self, autocasts=self.autocasts[:-1])
        if node.target is _set_grad_enabled:
            return replace(self, grad_enabled=node.args[0])
        return self

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Within the block, autocast is on or off as it is in this region."""
        with ExitStack() as stack:
            for args, kwargs in self.autocasts:
                stack.enter_context(torch.autocast(*args, **dict(kwargs)))
            yield


OUTSIDE = Region()
