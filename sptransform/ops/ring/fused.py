"""Functions of a few elementwise ops as one kernel on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

_log = logging.getLogger(__name__)

DEVICES = frozenset({"cuda"})  # where a kernel costs less than the memory it saves; on a CPU compiling costs more


def fused(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, whose first argument is a tensor, compiled by Inductor for tensors on a GPU.

    It is compiled for open sizes, at the first call. Where that fails, for want of a compiler say, and on other devices
    it runs as it is. No gradients pass through it.
    """
    compiled: Callable[..., Any] | None = None

    @wraps(fn)
    def run(*args: Any) -> Any:
        nonlocal compiled
        if args[0].device.type not in DEVICES:
            return fn(*args)
        if compiled is None:
            compiled = torch.compile(fn, dynamic=True)
        # apart from the tensors that they are views of, which Dynamo would compile anew for
        args = tuple(x.data if isinstance(x, Tensor) else x for x in args)
        try:
            with torch.no_grad():
                return compiled(*args)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # before anything ran
            _log.warning("%s is not compiled: each of its ops reads and writes memory (%s)", fn.__name__, error)
            compiled = fn
            return fn(*args)

    return run
