"""A model's graph as Dynamo makes it, in the hands of a function, while Dynamo's context is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sptransform.compiler import rewrite
from sptransform.compiler.dynamo import configured


def compiled_with(
    model: Callable[..., Any], backend: Callable[[fx.GraphModule, list[Any]], Any], *args: Any, **kwargs: Any
) -> Any:
    """Call `model` compiled with `backend`, in the configuration of the library."""
    torch.compiler.reset()
    return configured(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))(*args, **kwargs)


def while_captured(
    model: Callable[..., Any], use: Callable[[fx.GraphModule, list[Any]], Any], *args: Any, **kwargs: Any
) -> Any:
    """What `use` makes of the captured graph and its inputs, while Dynamo's context is open; nothing is run."""
    torch.compiler.reset()
    return rewrite.while_captured(model, use, *args, **kwargs)


def copied(inputs: Sequence[Any]) -> list[Any]:
    """Leaves of the same values, so that runs share no gradient and no buffer."""
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
