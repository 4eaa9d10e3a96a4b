"""Text generation: calls that read and extend a key/value cache run replicated on every rank.

A decoding step has one query, so there is no sequence to split. The caller's cache object holds the full keys and
values from one call to the next. Such a call is recognised by its arguments: a cache, and no gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from sptransform.parameters.modules import full_parameters

log = logging.getLogger(__name__)


def unsharded_with_cache(model: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, but the original ``model`` for calls with a cache and no gradients. Warns the first time."""
    is_told = False

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_told
        if torch.is_grad_enabled() or not _has_cache(args, kwargs):
            return call(*args, **kwargs)
        if not is_told:
            log.warning(
                "%s was called with a key/value cache and without gradients, as for text generation: "
                "such calls are not sharded, every rank runs the whole of them",
                type(model).__name__,
            )
            is_told = True
        with full_parameters():
            return model._call_impl(*args, **kwargs)  # what nn.Module calls when it is not compiled

    return run


def _has_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an argument is a cache: its class or a base is named ``Cache``, or it is ``past_key_values``."""
    return kwargs.get("past_key_values") is not None or any(
        kind.__name__ == "Cache" for x in (*args, *kwargs.values()) for kind in type(x).__mro__
    )
