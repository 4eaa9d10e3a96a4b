"""Autocast and grad-mode regions: which modes are active at a node.

Both appear as nodes of the captured graph. Autocast regions nest: one node enters a region, one leaves it. Grad mode is
a switch: leaving an inner ``no_grad`` inside an outer one sets it to False again, so its nodes do not pair up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

# Private: the calls that delimit regions in a traced graph; torch has no public names for them.
from torch._C import _set_grad_enabled
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


@dataclass(frozen=True)
class Region:
    """The modes active at one place of a graph; by default those of a training step, outside of any region.

    Attributes:
        autocasts: the arguments of ``torch.autocast`` for every open region, outermost first.
        grad_enabled: whether autograd records.
    """

    autocasts: tuple[tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]], ...] = ()
    grad_enabled: bool = True

    def after(self, node: fx.Node) -> Region:
        """The region right after ``node``, which is in this region."""
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
        """Within the block, autocast is as in this region."""
        with ExitStack() as stack:
            for args, kwargs in self.autocasts:
                stack.enter_context(torch.autocast(*args, **dict(kwargs)))
            yield

