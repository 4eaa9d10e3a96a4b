"""A user's model and one call of it, on one device: what ranks are compared with. The user's own objects stay as is.

Every run has a copy of the model and of the inputs, on the CPU and in float64, as if float64 were the default dtype: so
that a difference is no rounding. A model that does not run so is run in its own dtypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Private: the tensors among the arguments of a call
from torch.utils import _pytree as pytree

from sptransform.compiler.rewrite import arguments_of
from sptransform.diagnostics.errors import SPTransformError, UsageError, describe
from sptransform.testing.equality import Result, Tensors, differences
from sptransform.testing.generators import generators_kept, seed_generators
from sptransform.testing.outputs import Loss, Path, loss_of, spelled, tensors_in, whole
from sptransform.testing.rounding import (
    ROUNDINGS,
    TOLERANCE,
    TOLERANCE_IN_DOUBLE,
    NarrowFloats,
    moved_by_roundings,
)


@dataclass(frozen=True)
class Trial:
    """A copy of the model on the CPU, or a function that makes one, and a call's arguments; in their own dtypes."""

    model: nn.Module | Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor] | None = None

    @staticmethod
    def of(
        model: nn.Module | Callable[[], nn.Module],
        inputs: Mapping[str, Any] | tuple[Any, ...],
        loss: Callable[[Any], Tensor] | None,
    ) -> Trial:
        """Raises UsageError for what is none of these."""
        if not isinstance(inputs, Mapping | tuple):
            fix = "(x,), or {'x': x}"
            raise UsageError(describe("inputs are the arguments of a call", found=type(inputs).__name__, fix=fix))
        if loss is not None and not callable(loss):
            what = "loss is a function of what the model returns"
            raise UsageError(describe(what, found=repr(loss), fix="lambda outputs: .."))
        if isinstance(model, nn.Module):
            model = _copied(model, in_double=False)
        elif isinstance(model, type) or not callable(model):
            found = model.__name__ if isinstance(model, type) else type(model).__name__
            what = "verify takes an nn.Module, or a function that makes one"
            raise UsageError(describe(what, found=found, fix="the model itself, or lambda: Model(..)"))
        return Trial(model, *_copied(arguments_of(inputs), in_double=False), loss)

    def made(self, in_double: bool, in_evaluation: bool = False) -> nn.Module:
        """A model of its own, with the same weights at every call; in the user's mode, or in evaluation."""
        model = self.model
        if not isinstance(model, nn.Module):
            seed_generators(0)
            model = model()
            if not isinstance(model, nn.Module):
                what = "the function that is to make the model returns something else"
                raise UsageError(describe(what, found=type(model).__name__, fix="lambda: Model(..)"))
        model = _copied(model, in_double)
        return model.eval() if in_evaluation else model

    def arguments(self, in_double: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _copied((self.args, self.kwargs), in_double)


CopiedT = TypeVar("CopiedT")


def _copied(x: CopiedT, in_double: bool) -> CopiedT:
    """A copy that shares nothing: of a model, or of arguments; on the CPU, without gradients.

    Raises:
        UsageError: there are no values, or a process has only a part of them.
    """
    if isinstance(x, nn.Module):
        tensors = [*x.parameters(), *x.buffers()]
    else:
        tensors = [each for each in pytree.tree_leaves(x) if isinstance(each, Tensor)]
        tensors += [each for _, each in tensors_in(x)]
    for tensor in tensors:
        if tensor.is_meta:
            found, fix = f"a tensor of shape {tuple(tensor.shape)} on meta", "model.to_empty(device=..), then load"
            raise UsageError(describe("the model has no weights yet", found=found, fix=fix))
        if isinstance(tensor, DTensor):
            what = "verify takes the model and inputs of one device"
            raise UsageError(describe(what, found=f"a DTensor of shape {tuple(tensor.shape)}", fix="whole tensors"))
    stand_ins = {id(tensor): _stand_in(tensor, in_double) for tensor in tensors}
    try:
        return copy.deepcopy(x, stand_ins)
    except Exception as error:
        fix = "a function that makes the model: verify(lambda: Model(..), ..); or inputs without that object"
        found = f"{type(error).__name__}: {error}"
        raise UsageError(describe("the model, or an input, cannot be copied", found=found, fix=fix)) from error


def _stand_in(x: Tensor, in_double: bool) -> Tensor:
    wide = torch.complex128 if x.is_complex() else torch.float64 if x.is_floating_point() else x.dtype
    copied = x.detach().to("cpu", wide if in_double else x.dtype, copy=True)
    if isinstance(x, nn.Parameter):
        return nn.Parameter(copied, requires_grad=x.requires_grad)
    return copied.requires_grad_(x.requires_grad)


@dataclass(frozen=True)
class Step:
    """What a forward and backward gave: also the loss that was taken, and where in the output its tensors are.

    ``replaced``: names of buffers that the call did not write in place, but put others in their place.
    """

    result: Result
    loss: Loss
    paths: tuple[Path, ...]
    replaced: frozenset[str]


def step(
    model: nn.Module,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    loss: Callable[[Any], Loss],
    *,
    seed: int = 0,
    in_order: bool = False,
    watched: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 - it may be entered again and again
) -> Step:
    """One forward, inside of ``watched``, and backward; ``loss`` gives the loss to take of these outputs.

    ``in_order``: note gradients in the order in which the backward comes to them.
    """
    args, kwargs = arguments
    arrived: dict[str, None] = {}
    for name, parameter in model.named_parameters() if in_order else ():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.setdefault(name))
    before = dict(model.named_buffers())
    seed_generators(seed)
    with watched:
        outputs = model(*args, **kwargs)
        chosen = loss(outputs)
        scalar = chosen(outputs)
    found = {path: x for path, x in tensors_in(outputs) if path != chosen.path}
    if scalar.requires_grad:
        scalar.backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    after = dict(model.named_buffers())
    result = Result(
        whole(scalar.detach()),
        {name: grads[name] for name in dict.fromkeys((*arrived, *grads))},
        outputs={spelled(path): whole(x.detach()).clone() for path, x in found.items()},
        input_grads={name: whole(x.grad) for name, x in inputs_of(args, kwargs).items() if x.grad is not None},
        buffers={name: whole(x.detach()) for name, x in after.items()},
    )
    replaced = frozenset(name for name, x in after.items() if x is not before.get(name))
    return Step(result, chosen, tuple(found), replaced)


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensors:
    """The tensors among arguments, by where they are."""
    named = {**{f"args[{at}]": x for at, x in enumerate(args)}, **kwargs}
    return {spelled(path, name): x for name, given in named.items() for path, x in tensors_in(given)}


@dataclass(frozen=True)
class OneDevice:
    """What the call gives on one device, and how it is run there and on ranks.

    Attributes:
        first: the step; its gradients in the order in which the backward comes to them.
        in_double: whether everything is in float64, as far as the model lets it be.
        is_training: the model's mode.
        in_evaluation: whether it was put into evaluation mode, because it draws random numbers in training.
        narrow: dtype and line where the model computes in fewer bits all the same.
        bound, why: how far ranks may differ, and in words what that is.
        notes: what else a reader should know.
    """

    trial: Trial
    first: Step
    in_double: bool
    is_training: bool
    in_evaluation: bool
    narrow: str | None
    bound: float
    why: str
    notes: tuple[str, ...] = ()

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """A model for one more run, while everything is as it was on one device."""
        with _settings(self.in_double):
            yield self.trial.made(self.in_double, self.in_evaluation)

    def step(self, model: nn.Module) -> Result:
        return step(model, self.trial.arguments(self.in_double), lambda outputs: self.first.loss).result


def one_device(trial: Trial) -> OneDevice:
    """Run the call on one device, in float64 if it runs in that.

    Raises:
        UsageError: there is nothing to compare. What the model raises in its own dtypes is raised as it is.
    """
    try:
        return _one_device(trial, in_double=True)
    except SPTransformError:
        raise
    except Exception as error:
        found = _one_device(trial, in_double=False)
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        return replace(found, why=f"it does not run in float64 ({type(error).__name__}: {reason}); {found.why}")


def _one_device(trial: Trial, in_double: bool) -> OneDevice:
    with _settings(in_double):
        for in_evaluation in (False, True):

            def run(loss: Callable[[Any], Loss], in_evaluation: bool = in_evaluation, **how: Any) -> Step:
                return step(trial.made(in_double, in_evaluation), trial.arguments(in_double), loss, **how)

            first, narrow = run(lambda outputs: loss_of(outputs, trial.loss), in_order=True), NarrowFloats()
            if not first.result.loss.isfinite():
                what = "the loss on one device is no finite number, of which nothing can be shown"
                fix = "inputs for which it is finite, or loss=, a function of what the model returns"
                raise UsageError(describe(what, found=f"{float(first.result.loss)}, {first.loss.words}", fix=fix))
            again = run(lambda outputs, first=first: first.loss, seed=1, watched=narrow)
            drawn = max(differences(first.result, again.result), key=lambda each: each.error)
            if drawn.error <= TOLERANCE:
                break
        else:
            what = "the model draws random numbers, and ranks draw others than one device"
            found = f"{drawn.kind} {drawn.name} differs by {drawn.error:.1e} between two seeds"
            raise UsageError(describe(what, found=found, fix="pass what it draws as an input"))
        if not in_double:
            model = trial.made(in_double, in_evaluation)
            with moved_by_roundings(model.parameters()):
                moved = step(model, trial.arguments(in_double), lambda outputs: first.loss)
            own = max(each.error for each in differences(first.result, moved.result) if each.kind != "buffer")
            bound = ROUNDINGS * own
            why = f"{ROUNDINGS:g} times what one device is off by when every parameter moves by a rounding, {own:.1e}"
        elif narrow.first is None:
            bound, why = TOLERANCE_IN_DOUBLE, "everything is computed in float64"
        else:
            bound, why = TOLERANCE, f"the rounding of what the model computes in {narrow.first}"
        model = trial.made(in_double)
        is_training = model.training and not in_evaluation
        notes = tuple(_notes(model, first.result.grads, in_evaluation))
        return OneDevice(trial, first, in_double, is_training, in_evaluation, narrow.first, bound, why, notes)


def _notes(model: nn.Module, grads: Tensors, in_evaluation: bool) -> Iterator[str]:
    if in_evaluation and model.training:
        yield (
            "In training the model draws random numbers (dropout), and ranks draw others than one device: compared in "
            "evaluation mode. To compare in training, set its dropout to 0."
        )
    unseen = [name for name, p in model.named_parameters() if p.requires_grad and not _is_nonzero(grads.get(name))]
    if unseen:
        names = ", ".join(unseen[:3]) + (", .." if len(unseen) > 3 else "")
        whose = "parameters whose gradient on one device is zero, no number, or missing"
        yield f"Nothing is shown of {whose}: {len(unseen)}, {names}."


def _is_nonzero(grad: Tensor | None) -> bool:
    return grad is not None and bool((grad[grad.isfinite()] != 0).any())


@contextmanager
def _settings(in_double: bool) -> Iterator[None]:
    """The default dtype, generators, and modes of a run, whatever the caller has set."""
    before = torch.get_default_dtype()
    with generators_kept(), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.set_default_dtype(torch.float64 if in_double else before)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
