"""Where tensors are in what a model takes and returns, and which loss is made of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sptransform.diagnostics.errors import UsageError, describe

_SEED = 5
# steps into a structure: an attribute by its name, or an item by its key
Path = tuple[tuple[str, Any], ...]


def tensors_in(x: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Tensors of dataclasses, mappings, lists and tuples, in order. Other objects, such as caches, are not entered."""
    if isinstance(x, Tensor):
        yield path, x
    elif is_dataclass(x) and not isinstance(x, type):
        for each in fields(x):
            yield from tensors_in(getattr(x, each.name, None), (*path, ("attribute", each.name)))
    elif isinstance(x, Mapping):
        for key, value in x.items():
            yield from tensors_in(value, (*path, ("item", key)))
    elif isinstance(x, list | tuple):
        for at, value in enumerate(x):
            yield from tensors_in(value, (*path, ("item", at)))


def reach(x: Any, path: Path) -> Any:
    for kind, key in path:
        x = getattr(x, key) if kind == "attribute" else x[key]
    return x


def spelled(path: Path, root: str = "output") -> str:
    """``labels[0]``, ``output[2]``; of attributes of the output the attributes alone, ``hidden_states[2]``."""
    text = "".join(f".{key}" if kind == "attribute" else f"[{key!r}]" for kind, key in path)
    return text[1:] if text.startswith(".") and root == "output" else root + text


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@dataclass(frozen=True)
class Loss:
    """A scalar of what a model returns, and in words which one; ``path``: where it is, if it is returned."""

    of: Callable[[Any], Tensor]
    words: str
    path: Path | None = None

    def __call__(self, outputs: Any) -> Tensor:
        loss = self.of(outputs)
        if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.is_floating_point():
            found = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            fix = "loss=lambda outputs: .., a floating-point tensor without dimensions"
            raise UsageError(describe("the loss is no scalar", found=found, fix=fix))
        return loss


@dataclass(frozen=True)
class _At:
    path: Path

    def __call__(self, outputs: Any) -> Tensor:
        return reach(outputs, self.path)


@dataclass(frozen=True)
class _Projection:
    """The sum of all entries, each times a random number that is fixed; of each tensor over the root of its size."""

    weights: tuple[tuple[Path, Tensor], ...]

    def __call__(self, outputs: Any) -> Tensor:
        return sum((whole(reach(outputs, path)) * weight).sum() for path, weight in self.weights)


def loss_of(outputs: Any, given: Callable[[Any], Tensor] | None) -> Loss:
    """``given``; else the output's ``loss``; else an output that is a scalar; else a random projection of all outputs.

    Raises:
        UsageError: nothing floating-point is returned.
    """
    if given is not None:
        return Loss(given, "the function given as loss=")
    floating = [(path, x) for path, x in tensors_in(outputs) if x.is_floating_point()]
    for path, x in floating:
        if [key for _, key in path] == ["loss"] and x.dim() == 0:
            return Loss(_At(path), "the output's loss", path)
    for path, x in floating[:1]:
        if x.dim() == 0:
            return Loss(_At(path), f"the scalar {spelled(path)}", path)
    if not floating:
        found = type(outputs).__name__
        fix = "outputs in dataclasses, mappings, lists or tuples; or loss=lambda outputs: .., a scalar of them"
        raise UsageError(describe("the model returns no floating-point tensor to compare", found=found, fix=fix))
    generator = torch.Generator().manual_seed(_SEED)
    weights = [
        (path, torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) / max(x.numel(), 1) ** 0.5)
        for path, x in floating
    ]
    return Loss(_Projection(tuple(weights)), "a fixed random projection of all floating-point outputs")
