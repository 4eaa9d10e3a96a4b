"""The one torch.library namespace of the project, and how its ops are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("sptransform", "DEF")


def composite(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an op that decomposes into the ops of its body, in eager mode and in AOTAutograd's trace.

    The rewritten graph has one node for it; the backward of the body is the backward of the op. The body may use a
    ``torch.autograd.Function`` to state a transpose.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(schema)
        LIBRARY.impl(schema.split("(", 1)[0], fn, "CompositeImplicitAutograd")
        return fn

    return register


def primitive(schema: str, *, fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()) -> Callable[..., Any]:
    """Register an op the compiler must not look into: it reads the rank, or draws random numbers, when it runs."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema, tags=tags)
        LIBRARY.impl(name, fn, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sptransform::{name}", fake, lib=LIBRARY)
        return fn

    return register
