"""The model that a command is given, with its inputs: ``MODULE:FACTORY``, or a configuration of transformers.

Commands that only read a graph make it on the ``meta`` device, where weights take no memory.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sptransform.diagnostics.errors import SPTransformError, UsageError, describe
from sptransform.sweep.inputs import Maker
from sptransform.sweep.registries import REGISTRIES, imported, is_installed, made_small, tree_of
from sptransform.sweep.search import NothingRuns, Search
from sptransform.sweep.shrinking import Form

Inputs = Mapping[str, Any] | tuple[Any, ...]
_FACTORY_FIX = (
    "MODULE:FACTORY, a function without arguments, or with seq_len and batch, that returns a model or (model, inputs)"
)


@dataclass(frozen=True)
class Asked:
    """What a model and its inputs shall be.

    Attributes:
        of: ``MODULE:FACTORY``, or the path of a configuration.
        seq_len: tokens of a sequence; None leaves it to the factory.
        batch: rows.
        dtype: of parameters and floating-point inputs; None is as the model is made, bfloat16 of a configuration.
        on_meta: without memory for weights and inputs.
        small: make a configuration small, as the sweep does.
    """

    of: str
    seq_len: int | None
    batch: int = 1
    dtype: torch.dtype | None = None
    on_meta: bool = True
    small: bool = False


def model_and_inputs(asked: Asked) -> tuple[nn.Module, Inputs]:
    """Make the model, and inputs for it where its factory gives none.

    Raises:
        UsageError: there is no such factory or configuration, it fails, or no inputs are found.
    """
    make = _of_config if asked.of.endswith(".json") else _of_factory
    if asked.small and make is _of_factory:
        fix = f"a smaller model made by {asked.of}, without --small"
        raise UsageError(describe("only a configuration can be made small", found=asked.of, fix=fix))
    torch.manual_seed(0)
    model, inputs, dtype = make(asked)
    if dtype is not None:
        model = model.to(dtype)
    if inputs is None:
        inputs = _inputs_of(model, asked)
    placed = partial(_placed, dtype=dtype, device="meta" if asked.on_meta else None)
    return model, pytree.tree_map_only(Tensor, placed, inputs)


def _placed(x: Tensor, dtype: torch.dtype | None, device: str | None) -> Tensor:
    return x.to(device=device, dtype=dtype if x.is_floating_point() else None)


def _device(asked: Asked) -> Any:
    return torch.device("meta") if asked.on_meta else nullcontext()


# ---------------------------------------------------------------------------------------------------------------
# MODULE:FACTORY


def _of_factory(asked: Asked) -> tuple[nn.Module, Inputs | None, torch.dtype | None]:
    factory = _factory(asked.of)
    try:
        accepted = inspect.signature(factory).parameters
    except ValueError as error:  # some classes written in C
        raise UsageError(describe(f"{asked.of} is no function", found=str(error), fix=_FACTORY_FIX)) from error
    sizes = {"batch": asked.batch}
    if "seq_len" in accepted and (asked.seq_len is not None or accepted["seq_len"].default is inspect.Parameter.empty):
        sizes["seq_len"] = _length(asked)
    with _device(asked):
        made = _called(asked.of, lambda: factory(**{name: n for name, n in sizes.items() if name in accepted}))
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(inputs, Mapping | tuple | None):
        found = f"{type(model).__name__} and {type(inputs).__name__}"
        raise UsageError(describe(f"{asked.of} made no model", found=found, fix=_FACTORY_FIX))
    if inputs is not None:
        _check_call(asked.of, model, inputs)
    return model, inputs, asked.dtype


def _length(asked: Asked) -> int:
    if asked.seq_len is None:
        fix = "--seq-len with the tokens of a sequence"
        raise UsageError(describe(f"how long are the sequences of {asked.of}?", found="no --seq-len", fix=fix))
    return asked.seq_len


def _check_call(of: str, model: nn.Module, inputs: Inputs) -> None:
    """Raise UsageError where ``inputs`` are no arguments of the model."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**inputs) if isinstance(inputs, Mapping) else signature.bind(*inputs)
    except TypeError as error:
        fix = "inputs that model(*inputs) takes, or model(**inputs) if they are a mapping"
        found = f"{error}; forward{signature}"
        raise UsageError(describe(f"{of} made inputs that its model does not take", found=found, fix=fix)) from error


def _factory(of: str) -> Callable[..., Any]:
    name, _, path = of.partition(":")
    if not path or not all(name.split(".")):
        fix = f"{_FACTORY_FIX}; or the path of a config.json"
        raise UsageError(describe("a model is given as MODULE:FACTORY", found=repr(of), fix=fix))
    if os.getcwd() not in sys.path:  # as `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        fix = "the module's full name, from its folder or with that in PYTHONPATH; and what it imports installed"
        raise UsageError(describe(f"{name} cannot be imported", found=str(error), fix=fix)) from error
    except (Exception, SystemExit) as error:
        raise _failed(f"{name} cannot be imported", error, "what the error says") from error
    for part in path.split("."):
        if not hasattr(found, part):
            there = [each for each in vars(found) if callable(vars(found)[each]) and not each.startswith("_")]
            raise UsageError(describe(f"{name} has no {path}", found=", ".join(there) or "none", fix=_FACTORY_FIX))
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(describe(f"{of} is no function", found=type(found).__name__, fix=_FACTORY_FIX))
    return found


def _called(of: str, call: Callable[[], Any]) -> Any:
    """What the user's code returns; what it raises is a UsageError with its line."""
    try:
        return call()
    except SPTransformError:
        raise
    except (Exception, SystemExit) as error:
        fix = "what the error says; except by verify, models are made on the meta device, where tensors have no values"
        raise _failed(f"{of} cannot be made", error, fix) from error


def stepping(of: str, step: Callable[[], Any]) -> Any:
    """What a step of the model gives; what the model raises on one device is a UsageError with its line."""
    try:
        return step()
    except SPTransformError:
        raise
    except Exception as error:
        raise _failed(f"a step of {of} fails", error, "a model and inputs that run on one device") from error


def _failed(what: str, error: BaseException, fix: str) -> UsageError:
    """The error of what the user's code raised, with its line if it is not this file that made a wrong call."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    last = frames[-1]
    where = None if last.filename == __file__ else f"{last.filename}:{last.lineno}: {last.line}"
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return UsageError(describe(what, source=where, found=found, fix=fix))


# ---------------------------------------------------------------------------------------------------------------
# CONFIG.json


def _of_config(asked: Asked) -> tuple[nn.Module, None, torch.dtype]:
    library = imported("transformers")
    data = _read(asked.of)
    kinds = library.CONFIG_MAPPING
    kind_of = data.get("model_type")
    if not isinstance(kind_of, str) or kind_of not in kinds:
        raise UsageError(
            describe(
                f"{asked.of} is no configuration that transformers knows",
                found=f"model_type={kind_of!r}, transformers {library.__version__}",
                fix="a config.json of Hugging Face with its model_type, a newer transformers, or MODULE:FACTORY",
            )
        )
    try:
        config = kinds[kind_of].from_dict(data)
    except Exception as error:
        raise _failed(f"{asked.of} is no configuration of {kind_of}", error, "what the error says") from error
    kind, family = _class_of(config, library)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # training keeps no keys
    with _device(asked):
        if asked.small:
            model, _ = _called(asked.of, lambda: made_small(kind, config, family, Form()))
        else:
            model = _called(asked.of, lambda: kind(config))
    return model, None, asked.dtype or (torch.bfloat16 if asked.on_meta else torch.get_default_dtype())


def _read(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        fix = "the path of a config.json"
        raise UsageError(describe(f"{path} cannot be read", found=str(error), fix=fix)) from error
    return data if isinstance(data, dict) else {}


def _class_of(config: Any, library: Any) -> tuple[Any, str]:
    """The class that a configuration names, or else the first that its kind of model has; and the family of it."""
    auto = imported("transformers.models.auto.modeling_auto")
    registered = {family: dict(getattr(auto, name)) for family, name in REGISTRIES.items()}
    for name in config.architectures or ():
        if hasattr(library, name):
            return getattr(library, name), next((f for f, names in registered.items() if name in names.values()), "")
    for family, names in registered.items():
        name = names.get(config.model_type)
        if isinstance(name, str):
            return getattr(library, name), family
    fix = '"architectures": ["ClassName"] in it, or MODULE:FACTORY'
    raise UsageError(
        describe("the configuration names no model", found=f"architectures={config.architectures}", fix=fix)
    )


# ---------------------------------------------------------------------------------------------------------------
# Inputs


def _inputs_of(model: nn.Module, asked: Asked) -> dict[str, Any]:
    """Inputs for one training step. A causal language model gets tokens and labels; others, what the sweep finds."""
    config, tree = getattr(model, "config", None), {}
    if is_installed("transformers") and isinstance(config, imported("transformers").PreTrainedConfig):
        tree = tree_of(config)
    main = getattr(model, "main_input_name", None)
    n = _length(asked)
    maker = Maker(tree, main, batch=asked.batch, length=n, target=n, kept=n)
    if tree and _is_causal(model):
        ids = maker.ids(n)
        return {"input_ids": ids, "labels": ids}
    choices = maker.choices(model.forward)
    for name in ("attention_mask",) if main else ():  # nothing is padded
        choices.pop(name, None)
    missing = [name for name, values in choices.items() if not values]
    if missing:
        raise UsageError(_no_inputs(f"no rule for {', '.join(missing)}"))
    device, dtype = ("meta" if asked.on_meta else None), next((p.dtype for p in model.parameters()), None)

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        placed = partial(_placed, dtype=dtype, device=device)
        with torch.no_grad():
            model(**pytree.tree_map_only(Tensor, placed, inputs))
        return inputs

    try:
        return Search(choices, run).found()
    except (NothingRuns, TimeoutError) as none:
        raise UsageError(_no_inputs(f"with those that were tried: {none.__cause__ or none}")) from none


def _no_inputs(found: str) -> str:
    fix = "MODULE:FACTORY of a function that returns (model, inputs)"
    return describe("no inputs were found for this model", found=found, fix=fix)


def _is_causal(model: nn.Module) -> bool:
    auto = imported("transformers.models.auto.modeling_auto")
    names = dict(getattr(auto, REGISTRIES["causal-lm"])).values()
    return type(model).__name__ in names
