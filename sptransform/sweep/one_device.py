"""Find the smallest form of an architecture that runs on one device, and what its loss and gradients are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sptransform.sweep.inputs import Maker
from sptransform.sweep.registries import Architecture, model_of
from sptransform.sweep.search import Inputs, NothingRuns, Search
from sptransform.sweep.shrinking import Form
from sptransform.testing.equality import Result

NOISE = 0.1
MOST_PARAMETERS = 60_000_000
# tried in this order
FORMS = (
    Form(), Form(filled=True), Form(share=False), Form(layers=4), Form(head_size=32), Form(layers=4, share=False),
    Form(channels=False),
)  # fmt: skip


class NotBuilt(Exception):
    """The architecture does not run on one device; the reason, of the attempt that came furthest."""


class WithLoss(nn.Module):
    """A model that returns its loss; one that has none, a sum of its first output weighted at random."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs, weights: Tensor | None) -> Tensor:
        output = self.model(**inputs)
        return output.loss if weights is None else (first_output(output) * weights).mean()


@dataclass(frozen=True)
class Built:
    """A model that runs, its inputs, and its loss and gradients on one device."""

    model: WithLoss
    inputs: dict[str, Any]
    reference: Result

    buffers: dict[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def run(self) -> Result:
        return one_device(self.model, self.inputs, self.buffers)


def built(architecture: Architecture) -> Built:
    """The first form that runs, in float64 if one does; its dtype is then the default one.

    Raises:
        NotBuilt: none runs.
    """
    reasons: list[tuple[int, str]] = []
    for dtype, form in (*((torch.float64, form) for form in FORMS), *((torch.float32, form) for form in FORMS[:2])):
        torch.set_default_dtype(dtype)
        try:
            return _built(architecture, form)
        except NotBuilt as error:
            reasons.append(error.args)
        except TimeoutError as error:  # no other form is smaller
            raise NotBuilt(2, said(error)) from error
    torch.set_default_dtype(torch.float64)
    raise NotBuilt(*max(reasons, key=lambda reason: reason[0]))


def _built(architecture: Architecture, form: Form) -> Built:
    """Raises NotBuilt with how far it came, and why no further."""
    try:
        with torch.device("meta"):
            number = sum(p.numel() for p in model_of(architecture, form)[0].parameters())
        if number > MOST_PARAMETERS:
            raise NotBuilt(0, f"{number:,} parameters in the small configuration")
        torch.manual_seed(0)
        model, tree = model_of(architecture, form)
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(0, said(error)) from error
    add_noise(model)
    model.to(torch.get_default_dtype()).train()
    choices = Maker(tree, getattr(model, "main_input_name", None)).choices(model.forward)
    missing = [name for name, values in choices.items() if not values]
    if missing:
        raise NotBuilt(1, f"no rule for the input {', '.join(missing)}")
    try:
        return Search(choices, lambda inputs: _run(WithLoss(model), inputs)).found()
    except NothingRuns as none:
        raise NotBuilt(2, said(none.__cause__)) from none


def _run(model: WithLoss, inputs: Inputs) -> Built:
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output = model.model(**inputs)
    weights = None
    if getattr(output, "loss", None) is None:
        shape = first_output(output).shape
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(torch.get_default_dtype())
    given = {"inputs": inputs, "weights": weights}
    first, again = (one_device(model, given, state) for _ in range(2))
    if not first.loss.isfinite() or not all(grad.isfinite().all() for grad in first.grads.values()):
        raise ValueError("the loss, or a gradient, is not finite")
    if not torch.equal(first.loss, again.loss):
        if model.training:
            return _run(model.eval(), inputs)
        raise ValueError("two runs give different losses, in eval mode too")
    if not any(grad.any() for grad in first.grads.values()):
        raise ValueError("nothing has a gradient")
    return Built(model, given, first, state)


def one_device(model: nn.Module, inputs: Inputs, state: dict[str, Tensor]) -> Result:
    """Loss and gradients; buffers are then as in ``state``."""
    model.zero_grad()
    loss = model(**inputs)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in state:
                buffer.copy_(state[name])
    return Result(loss.detach().clone(), grads)


def first_output(output: Any) -> Tensor:
    """The first output that can have a gradient."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return next(x for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point())


def add_noise(model: nn.Module) -> None:
    """Move every parameter: at their initial values attention is near uniform, and a wrong mask would hardly matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))


def said(error: BaseException) -> str:
    """The first line of an error, with its class if the line does not say much."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]
