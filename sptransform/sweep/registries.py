"""The architectures of the installed libraries, by family, and how each is built small from its default configuration.

Both libraries are optional: what is not installed is left out, and asked for by name it is an error.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.sweep.shrinking import Form, Tree, nodes, shrunk

# family -> the registry of transformers
REGISTRIES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "embedding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}
DIFFUSION = "diffusion"
FAMILIES = (*REGISTRIES, DIFFUSION)


@dataclass(frozen=True)
class Architecture:
    """A class of a library that is a model."""

    library: str
    family: str
    name: str


def architectures(families: tuple[str, ...] = FAMILIES) -> list[Architecture]:
    """Those of the families, of the libraries that are installed; a class of several families is of the first."""
    found: dict[str, Architecture] = {}
    if set(families) & set(REGISTRIES):
        auto = imported("transformers.models.auto.modeling_auto")
        for family in families:
            for entry in getattr(auto, REGISTRIES[family]).values() if family in REGISTRIES else ():
                for name in (entry,) if isinstance(entry, str) else entry:
                    found.setdefault(name, Architecture("transformers", family, name))
    if DIFFUSION in families:
        models = imported("diffusers.models.transformers")
        for name, value in sorted(vars(models).items()):
            if inspect.isclass(value) and issubclass(value, nn.Module):
                found.setdefault(name, Architecture("diffusers", DIFFUSION, name))
    return list(found.values())


def versions() -> dict[str, str]:
    """Of what a result depends on, but for our own."""
    return {name: v for name in ("torch", "transformers", "diffusers") if (v := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_installed(library: str) -> bool:
    return _version(library) is not None


def imported(module: str) -> Any:
    """A module of an optional library. Raises UsageError where that is not installed."""
    library = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            describe(
                f"this needs {library}",
                found=str(error),
                fix=f"pip install {library}; of the sweep, --family others does without",
            )
        ) from error


def model_of(architecture: Architecture, form: Form) -> tuple[nn.Module, Tree]:
    """The architecture, made small, and its configuration."""
    built = _of_transformers if architecture.library == "transformers" else _of_diffusers
    return built(architecture, form)


# what a family asks of the configurations that have these fields
_SETTINGS = {"causal-lm": {"is_decoder": True}, "embedding": {"is_encoder_decoder": False}}


def _of_transformers(architecture: Architecture, form: Form) -> tuple[nn.Module, Tree]:
    kind = getattr(imported("transformers"), architecture.name)
    return made_small(kind, kind.config_class(), architecture.family, form)


def made_small(kind: Any, config: Any, family: str, form: Form) -> tuple[nn.Module, Tree]:
    """A class of transformers, from its configuration made small, which is changed; and that configuration."""
    tree = shrunk(tree_of(config), form)
    tree |= {name: v for name, v in _SETTINGS.get(family, {}).items() if name in tree}
    _assign(config, tree)
    model = _made(kind, config, tree)
    experts = getattr(model, "set_experts_implementation", None)
    if experts is not None and torch.get_default_dtype() == torch.float64:
        # the default has no float64; of experts that cannot be set to another, float32 is what runs
        with suppress(ValueError):
            experts("batched_mm")
    return model, tree


def _made(kind: Any, config: Any, tree: Tree) -> nn.Module:
    """The model. A field that one part of the configuration lacks is as in another that has it."""
    try:
        return kind(config)
    except AttributeError as error:
        known = [node[error.name] for node in nodes(tree) if error.name in node]
        if not isinstance(error.obj, imported("transformers").PreTrainedConfig) or not known:
            raise
        setattr(error.obj, error.name, known[0])
    return _made(kind, config, tree)


def _of_diffusers(architecture: Architecture, form: Form) -> tuple[nn.Module, Tree]:
    kind = getattr(imported("diffusers.models.transformers"), architecture.name)
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    tree = shrunk({name: list(v) if isinstance(v, tuple) else v for name, v in defaults.items()}, form)
    given = {name: tuple(tree[name]) if isinstance(v, tuple) else tree[name] for name, v in defaults.items()}
    return kind(**given), tree


# of a configuration, but no part of the architecture
_ASIDE = {"id2label", "label2id", "architectures", "transformers_version"}


# of a field whose value is another in some layers: the list of all layers' values
_BY_LAYER = "by_layer_"


def tree_of(config: Any) -> Tree:
    """The values of a configuration of transformers, by name; configurations inside of it are trees of their own."""
    return _tree(config, imported("transformers").PreTrainedConfig)


def _tree(config: Any, configuration: type) -> Tree:
    tree = dict(_leaves(vars(config), configuration))
    if getattr(config, "is_heterogeneous", False):
        layers = [vars(layer) for layer in config.per_layer_config]
        varying = [name for name in tree if any(layer[name] != tree[name] for layer in layers)]
        tree |= {_BY_LAYER + name: [layer[name] for layer in layers] for name in varying}
    return tree


def _leaves(values: Mapping[str, Any], configuration: type) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if not isinstance(name, str) or name.startswith("_") or name in _ASIDE:
            continue
        if isinstance(value, configuration):
            yield name, _tree(value, configuration)
        elif isinstance(value, dict):
            yield name, dict(_leaves(value, configuration))
        else:
            yield name, list(value) if isinstance(value, tuple) else value


def _assign(config: Any, tree: Tree) -> None:
    """Put the values where they came from; a dict keeps what is no leaf of the tree."""
    by_layer = {name.removeprefix(_BY_LAYER): v for name, v in tree.items() if name.startswith(_BY_LAYER)}
    if by_layer:
        config.per_layer_config = None
    for name, value in tree.items():
        if name.startswith(_BY_LAYER):
            continue
        old = config[name] if isinstance(config, dict) else vars(config)[name]
        if isinstance(value, dict) and old is not None:
            _assign(old, value)
        elif (value := tuple(value) if isinstance(old, tuple) else value) != old:
            if isinstance(config, dict):
                config[name] = value
            else:
                setattr(config, name, value)
    if by_layer:
        layers = zip(*by_layer.values(), strict=True)
        config.per_layer_config = {at: dict(zip(by_layer, values, strict=True)) for at, values in enumerate(layers)}
