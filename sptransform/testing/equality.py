"""What a run gives, and how far it is from what one device gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# A tensor whose largest gradient is below this share of the model's largest one is measured against that
# share. The true gradient of a key bias, for one, is zero: it moves all scores of a query alike, and softmax
# does not see it. What a run computes there is rounding, unrelated to any other run's rounding, so an error
# relative to itself means nothing. A small gradient that is real is still compared, since the tolerances are
# far below this share. The same holds among outputs, and among buffers.
FLOOR = 1e-2

Tensors = dict[str, Tensor]


def _rank_of_this_process() -> int | None:
    return dist.get_rank() if dist.is_initialized() else None


@dataclass(frozen=True)
class Result:
    """A loss, and the gradient of every trainable parameter by name; and the rank that has them, if one does.

    ``outputs`` by where they are in what the model returns, ``input_grads`` by where the input is, and ``buffers`` as
    they are after the call; where these are compared too.
    """

    loss: Tensor
    grads: Tensors
    rank: int | None = field(default_factory=_rank_of_this_process, kw_only=True)
    outputs: Tensors = field(default_factory=dict, kw_only=True)
    input_grads: Tensors = field(default_factory=dict, kw_only=True)
    buffers: Tensors = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from one device's: the largest difference over the largest value.

    ``kind``: "loss", "output", "parameter" or "input" (their gradients), "buffer". ``name`` within that.
    """

    kind: str
    name: str
    error: float


def differences(reference: Result, got: Result) -> Iterator[Difference]:
    """Of every tensor; infinite for one that only one of the two has."""
    yield Difference("loss", "loss", relative_error(reference.loss, got.loss))
    grads = {**reference.grads, **reference.input_grads}
    pairs = (
        ("output", reference.outputs, got.outputs, reference.outputs),
        ("parameter", reference.grads, got.grads, grads),
        ("input", reference.input_grads, got.input_grads, grads),
        ("buffer", reference.buffers, got.buffers, reference.buffers),
    )
    for kind, expected, found, together in pairs:
        floor = FLOOR * max(map(largest, together.values()), default=0.0)
        for name in (*expected, *(found.keys() - expected.keys())):
            both = name in expected and name in found
            error = relative_error(expected[name], found[name], floor) if both else float("inf")
            yield Difference(kind, name, error)


def worst_error(reference: Result, got: Result) -> tuple[str, float]:
    """The tensor ("loss" or a parameter's name) that differs most from the reference, and by how much.

    Gradients that only ``got`` has do not count.
    """
    known = Result(got.loss, {name: got.grads[name] for name in reference.grads}, rank=got.rank)
    expected = Result(reference.loss, reference.grads, rank=reference.rank)
    worst = max(differences(expected, known), key=lambda each: each.error)
    return worst.name, worst.error


def relative_error(reference: Tensor, got: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest reference value, or over ``floor`` if that is larger.

    Infinite for other shapes, and where an entry is infinite or no number in one of the two only.
    """
    if reference.shape != got.shape:
        return float("inf")
    reference, got = reference.detach().to(_wide(reference)), got.detach().to(_wide(got))
    odd = ~reference.isfinite()
    if not torch.equal(odd, ~got.isfinite()) or not torch.allclose(reference[odd], got[odd], equal_nan=True):
        return float("inf")
    reference, got = reference[~odd], got[~odd]
    difference = largest(reference - got)
    return difference / max(largest(reference), floor) if difference else 0.0


def _wide(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def largest(x: Tensor) -> float:
    """The largest absolute value; of a tensor without entries, zero."""
    return float(x.detach().to(_wide(x)).abs().max()) if x.numel() else 0.0
