"""Text generation: calls that read and extend a key/value cache run whole, on every rank alike.

A decoding step has one query, so there is no sequence to split, and what it attends to lives in an object of the
caller's from one call to the next, whole. Such a call is recognised by its arguments: a cache, and no gradients.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

# what Hugging Face models call the cache that generate() hands to every call, the first included
CACHE_ARGUMENTS = ("past_key_values", "cache_params")


def whole_with_cache(model: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, but without gradients and with a cache ``model`` as it was. Logs a warning the first time."""
    parameters = list(inspect.signature(model.forward).parameters)
    positions = {name: parameters.index(name) for name in CACHE_ARGUMENTS if name in parameters}
    if not positions:
        return call
    is_told = False

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_told
        given = (kwargs.get(name, args[at] if at < len(args) else None) for name, at in positions.items())
        if torch.is_grad_enabled() or all(cache is None for cache in given):
            return call(*args, **kwargs)
        if not is_told:
            log.warning(
                "%s was called with a key/value cache, without gradients, as for text generation: "
                "such calls are not sharded, every rank runs the whole of them",
                type(model).__name__,
            )
            is_told = True
        return model._call_impl(*args, **kwargs)  # what nn.Module calls when it is not compiled

    return run
