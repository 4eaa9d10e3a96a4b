"""The loss and gradients of a run, and how far they are from those of one device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

# A tensor whose largest gradient is below this share of the model's largest one is measured against that
# share. The true gradient of a key bias, for one, is zero: it moves all scores of a query alike, and softmax
# does not see it. What a run computes there is rounding, unrelated to any other run's rounding, so an error
# relative to itself means nothing. A small gradient that is real is still compared, since the tolerances are
# far below this share.
FLOOR = 1e-2


def _rank_of_this_process() -> int | None:
    return dist.get_rank() if dist.is_initialized() else None


@dataclass(frozen=True)
class Result:
    """A loss, and the gradient of every trainable parameter by name; and the rank that has them, if one does."""

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    rank: int | None = field(default_factory=_rank_of_this_process, kw_only=True)


def worst_error(reference: Result, got: Result) -> tuple[str, float]:
    """The tensor ("loss" or a parameter's name) that differs most from the reference, and by how much."""
    floor = FLOOR * max(map(_largest, reference.grads.values()))
    errors = {name: _relative_error(grad, got.grads[name], floor) for name, grad in reference.grads.items()}
    errors["loss"] = _relative_error(reference.loss, got.loss, 0.0)
    worst = max(errors, key=errors.__getitem__)
    return worst, errors[worst]


def _relative_error(reference: torch.Tensor, got: torch.Tensor, floor: float) -> float:
    """The largest difference over the largest reference value; infinite where there is nothing to compare."""
    if reference.shape != got.shape or not bool(got.isfinite().all()):
        return float("inf")
    difference = _largest(reference.double() - got.double())
    return difference / max(_largest(reference), floor) if difference else 0.0


def _largest(x: torch.Tensor) -> float:
    """The largest absolute value; of a tensor without entries, zero."""
    return float(x.abs().max()) if x.numel() else 0.0
