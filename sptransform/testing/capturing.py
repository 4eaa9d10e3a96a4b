"""A model's graph as Dynamo makes it, in the hands of a function, while Dynamo's context is open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sptransform.compiler.dynamo import configured
from sptransform.diagnostics.errors import SPTransformError


class _Stop(SPTransformError):
    """Ends the model's call once its graph is captured, before Dynamo makes guards that nobody will check."""


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
    made: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(use(gm, inputs))
        raise _Stop

    with contextlib.suppress(_Stop):
        compiled_with(model, backend, *args, **kwargs)
    return made[0]


def copied(inputs: Sequence[Any]) -> list[Any]:
    """Leaves of the same values, so that runs share no gradient and no buffer."""
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
