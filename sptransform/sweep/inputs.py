"""Inputs for a model, from the signature of its forward and its configuration: one rule for every architecture.

An input's name says what it holds: token ids, a mask, pixels, sound, the latents of a diffusion model. Where that
leaves several shapes, all are given in turn, likely ones first; what runs on one device is right. Each has two
sequences, the second of them padded where there is a mask; lengths are no multiples of anything.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sptransform.sweep.shrinking import Tree, kind_of, nodes

BATCH, LENGTH, PADDED, TARGET, TEXT = 2, 44, 31, 18, 11
MOST = 300
IGNORED = -100
# fields with the width of what a diffusion model is told, likely ones first
CONTEXTS = (
    "joint_attention_dim", "cross_attention_dim", "caption_channels", "caption_dim", "context_in_dim", "text_embed_dim",
    "text_dim", "text_hidden_dim", "cap_feat_dim", "text_in_channels", "encoder_hidden", "in_text_dim", "context_dim",
    "encoder_dim", "text", "hidden_size",
)  # fmt: skip

Inputs = dict[str, Any]


class Maker:
    """Makes the inputs of one model.

    Args:
        tree: the model's configuration.
        main: the input that the library calls the main one, if it does.
    """

    def __init__(self, tree: Tree, main: str | None) -> None:
        self.tree = tree
        self.main = main
        self._generator = torch.Generator().manual_seed(1)

    def all_of(self, forward: Callable[..., Any]) -> Iterator[Inputs]:
        """Inputs to try, at most ``MOST`` of them, the likeliest first."""
        parameters = [
            p for p in inspect.signature(forward).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        required = {p.name for p in parameters if p.default is p.empty} | {self.main} - {None}
        choices: dict[str, list[Any]] = {}
        for name in sorted((p.name for p in parameters), key=lambda name: name != self.main):
            if name in required:
                choices[name] = self._required(name)
            elif name in OPTIONAL and (found := OPTIONAL[name](self)):
                choices[name] = found
        places = itertools.product(*(range(len(each)) for each in choices.values()))
        # few that are not the likeliest, first; the main input last, since some models keep what they were first given
        ordered = sorted(places, key=lambda place: (sum(map(bool, place)), place))
        for place in ordered[:MOST]:
            values = {name: each[at] for (name, each), at in zip(choices.items(), place, strict=True)}
            yield {name: value for name, value in values.items() if value is not None}

    def _required(self, name: str) -> list[Any]:
        make = REQUIRED.get(name) or OPTIONAL.get(name)
        return [x for x in make(self) if x is not None] if make is not None else []

    # what configurations say

    def numbers(self, *names: str) -> list[int]:
        """Values of fields whose names have one of the words, those of the outermost configuration first."""
        found = [
            value
            for word in names
            for node in nodes(self.tree)
            for name, value in node.items()
            if word in name and isinstance(value, int) and not isinstance(value, bool) and value > 0
        ]
        return list(dict.fromkeys(found))

    def sizes(self, *names: str) -> list[int]:
        """As `numbers`, of lists too, their first entries."""
        found = []
        for node in nodes(self.tree):
            for name, value in node.items():
                if name in names and value:
                    found.append(value[0] if isinstance(value, list) else value)
        return [x for x in dict.fromkeys(found) if isinstance(x, int)]

    # kinds of tensors

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64).to(torch.get_default_dtype())

    def ids(self, length: int, *rest: int) -> Tensor:
        """Tokens without a meaning of their own."""
        sizes = [v for v in self.sizes("vocab_size", "src_vocab_size", "audio_vocab_size", "codebook_size") if v > 8]
        special = {
            each
            for node in nodes(self.tree)
            for name, value in node.items()
            if kind_of(name) == "token"
            for each in (value if isinstance(value, list) else [value])
        }
        usable = torch.tensor([v for v in range(3, min(sizes, default=64)) if v not in special])
        return usable[torch.randint(len(usable), (BATCH, length, *rest), generator=self._generator)]

    def classes(self, number: int, *shape: int) -> Tensor:
        return torch.randint(number, (BATCH, *shape), generator=self._generator)

    def images(self) -> list[Tensor]:
        channels = [*self.sizes("num_channels", "in_channels", "in_chans"), 3]
        edges = [*self.sizes("image_size", "img_size", "sample_size"), 24, 64, 96, 128, 224]
        return [self.normal(BATCH, c, e, e) for e in dict.fromkeys(edges) for c in dict.fromkeys(channels)]

    def sound(self) -> list[Tensor]:
        mel = self.sizes("num_mel_bins", "input_feat_per_channel", "feature_size", "input_size") or [80]
        frames = (
            [2 * n for n in self.sizes("max_source_positions")] + self.sizes("max_length") + [2 * LENGTH, 8 * LENGTH]
        )
        spectra = [self.normal(BATCH, n, m) for n in frames for m in mel]
        return [*spectra, *(x.mT.contiguous() for x in spectra)]

    def latents(self) -> list[Tensor]:
        """Of images, of videos, of sounds, and sequences of them."""
        channels = self.sizes(
            "in_channels", "latent_channels", "in_chans", "in_dim", "in_visual_dim", "audio_in_channels"
        )
        edges = [(6, 10), *((e, e) for e in self.sizes("sample_size", "image_size")), (8, 8), (16, 16)]
        found = []
        for c in channels or [4]:
            found.append(self.normal(BATCH, 35, c))
            found += [self.normal(BATCH, c, *edge) for edge in edges]
            found += [self.normal(BATCH, c, frames, *edge) for frames in (3, 4) for edge in edges[:2]]
            found += [self.normal(BATCH, frames, c, *edge) for frames in (3, 4) for edge in edges[:2]]
            found.append(self.normal(BATCH, c, 35))
        return found

    def contexts(self) -> list[Tensor]:
        widths = self.numbers(*CONTEXTS)
        return [self.normal(BATCH, TEXT, width) for width in widths if width > 3]

    def labels(self) -> list[Tensor | None]:
        """Of tokens, of a decoder, of what is heard or seen; none, if none will do."""
        classes = self.classes(2)
        if self.main == "pixel_values":
            return [classes, None]
        if self.main != "input_ids":
            return [self.ids(5), self.ids(TARGET), classes, None]
        target = self.ids(TARGET)
        target[1, -4:] = IGNORED
        tokens = self.ids(LENGTH)
        tokens[1, PADDED:] = IGNORED
        decodes = bool(self.tree.get("is_encoder_decoder"))
        return [target, tokens, classes, None] if decodes else [tokens, classes, None]


def padding() -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor([LENGTH, PADDED])[:, None]).long()


def _steps(maker: Maker) -> list[Tensor]:
    steps = torch.tensor([400.0, 20.0], dtype=torch.get_default_dtype())
    return [steps, steps / 1000, steps.long()]


def _masks(maker: Maker) -> list[Tensor | None]:
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    return [mask, mask.long(), None]


# An input that is needed; one that is None in `OPTIONAL` may be left out.
REQUIRED: dict[str, Callable[[Maker], list[Any]]] = {
    "cap_feats": lambda m: [list(x) for x in m.contexts()],
    "decoder_input_ids": lambda m: [m.ids(TARGET)],
    "encoder_hidden_states": Maker.contexts,
    "encoder_mask": _masks,
    "hidden_states": Maker.latents,
    "input_features": Maker.sound,
    "input_ids": lambda m: [m.ids(LENGTH)],
    "input_values": lambda m: [m.normal(BATCH, 900), m.normal(BATCH, 14_400), *m.sound(), m.normal(BATCH, 1, 14_400)],
    "inputs": lambda m: [m.ids(LENGTH), *m.images()],
    "inputs_embeds": lambda m: [m.normal(BATCH, TEXT, w) for w in m.sizes("hidden_size")],
    "pixel_values": Maker.images,
    "position_ids": lambda m: [torch.arange(LENGTH).expand(BATCH, LENGTH), m.normal(35 + TEXT, 3).abs() * 5],
    "proj_embedding": lambda m: [m.normal(BATCH, w) for w in m.numbers("embedding_dim")],
    "timestep": _steps,
    "timestep_r": _steps,
    "r_timestep": _steps,
    "t": _steps,
    "x": lambda m: [list(x) for x in m.latents()],
}
OPTIONAL: dict[str, Callable[[Maker], list[Any]]] = {
    "attention_mask": lambda m: [padding(), None] if m.main == "input_ids" else [],
    "class_labels": lambda m: [m.classes(2), None],
    "crop_coords": lambda m: [torch.zeros(BATCH, 2)],
    "decoder_input_ids": lambda m: [None, m.ids(TARGET)],
    "encoder_attention_mask": lambda m: _masks(m) if m.main is None else [],
    "encoder_hidden_states": lambda m: [*m.contexts(), None] if m.main is None else [],
    "encoder_hidden_states_mask": _masks,
    "guidance": lambda m: [m.normal(BATCH), None] if m.main is None else [],
    "height": lambda m: [5],
    "img_ids": lambda m: [m.normal(35, n).abs() * 5 for n in (3, 4)],
    "img_shapes": lambda m: [[[(1, 5, 7)]] * BATCH],
    "labels": Maker.labels,
    "num_frames": lambda m: [1],
    "original_size": lambda m: [torch.full((BATCH, 2), 64.0)],
    "pooled_projections": lambda m: [m.normal(BATCH, w) for w in m.numbers("pooled_projection_dim")] + [None],
    "target_size": lambda m: [torch.full((BATCH, 2), 64.0)],
    "timestep": _steps,
    "txt_ids": lambda m: [m.normal(TEXT, n).abs() * 5 for n in (3, 4)],
    "width": lambda m: [7],
}
