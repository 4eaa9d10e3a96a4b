"""Inputs for a model, from the signature of its forward and its configuration: one rule for every architecture.

An input's name says what it holds: token ids, a mask, pixels, sound, the latents of a diffusion model. Where that
leaves several shapes, all are tried (`search.py`); what runs on one device is right. Each has two sequences, the second
of them padded where there is a mask; lengths are no multiples of anything.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sptransform.sweep.shrinking import Tree, kind_of, nodes, words

BATCH, LENGTH, PADDED, TARGET, TEXT = 2, 44, 31, 18, 11
IGNORED = -100
# values of an input that has a default
MOST_UNLIKELY = 12
# fields with the width of what a diffusion model is told, likely ones first
CONTEXTS = (
    "joint_attention_dim", "cross_attention_dim", "caption_channels", "caption_dim", "context_in_dim", "text_embed_dim",
    "text_dim", "text_hidden_dim", "cap_feat_dim", "text_in_channels", "encoder_hidden", "in_text_dim", "context_dim",
    "encoder_dim", "condition_dim", "cond_token_dim", "text", "hidden_size",
    "embedding_dim",
)  # fmt: skip


class Maker:
    """Makes the inputs of one model.

    Args:
        tree: the model's configuration.
        main: the input that the library calls the main one, if it does.
        batch: the number of rows.
        length: of sequences of tokens.
        target: the length of what a decoder makes.
        kept: how many tokens of every row but the first are no padding.
    """

    def __init__(
        self,
        tree: Tree,
        main: str | None,
        *,
        batch: int = BATCH,
        length: int = LENGTH,
        target: int = TARGET,
        kept: int = PADDED,
    ) -> None:
        self.batch, self.length, self.target, self.kept = batch, length, target, kept
        self.tree = tree
        self.main = main
        self._generator = torch.Generator().manual_seed(1)

    def choices(self, forward: Callable[..., Any]) -> dict[str, list[Any]]:
        """What each input may be, likely values first; none for one that no rule makes. The surest inputs come first.

        These are the main one, which has few forms; without a main one, those with defaults.
        """
        parameters = [
            p for p in inspect.signature(forward).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        required = {p.name for p in parameters if p.default is p.empty} | {self.main} - {None}
        choices: dict[str, list[Any]] = {}
        names = [p.name for p in parameters]
        for name in sorted(names, key=lambda name: name != self.main) if self.main else reversed(names):
            if name in required:
                choices[name] = self._required(name)
            elif name in OPTIONAL and (found := OPTIONAL[name](self)):
                choices[name] = found
            elif self.main is None and (found := self._by_words(name)):  # may be needed, though it has a default
                choices[name] = [None, *found[:MOST_UNLIKELY]]
        return choices

    def _required(self, name: str) -> list[Any]:
        make = REQUIRED.get(name) or OPTIONAL.get(name)
        found = [x for x in make(self) if x is not None] if make is not None else []
        return found or self._by_words(name) or [self.tree[each] for each in (name,) if self.tree.get(each)]

    def _by_words(self, name: str) -> list[Any]:
        return next((make(self, name) for pattern, make in BY_WORDS if re.search(pattern, name)), [])

    def like(self, name: str) -> list[Tensor]:
        """Sequences, and single rows, as wide as fields say whose names share words with this one."""
        shared = {
            (len(words(field) & words(name)), value)
            for node in nodes(self.tree)
            for field, value in node.items()
            if kind_of(field) == "width" and isinstance(value, int)
        }
        widths = [width for number, width in sorted(shared, reverse=True) if number > 0]
        return [
            self.normal(*shape, w) for w in widths for shape in ((self.batch, TEXT), (self.batch,), (self.batch, 35))
        ]

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
        return usable[torch.randint(len(usable), (self.batch, length, *rest), generator=self._generator)]

    def classes(self, number: int, *shape: int) -> Tensor:
        return torch.randint(number, (self.batch, *shape), generator=self._generator)

    def images(self) -> list[Tensor]:
        channels = [*self.sizes("num_channels", "in_channels", "in_chans"), 3]
        edges = [*self.sizes("image_size", "img_size", "sample_size"), 24, 64, 96, 128, 224]
        found = [self.normal(self.batch, c, e, e) for e in dict.fromkeys(edges) for c in dict.fromkeys(channels)]
        # as patches in a row
        return [*found, *(self.normal(self.batch, 35, c * p * p) for p in self.sizes("patch_size") for c in channels)]

    def sound(self) -> list[Tensor]:
        mel = self.sizes("num_mel_bins", "input_feat_per_channel", "feature_size", "input_size") or [80]
        frames = (
            [2 * n for n in self.sizes("max_source_positions")]
            + self.sizes("max_length")
            + [2 * self.length, 8 * self.length]
        )
        spectra = [self.normal(self.batch, n, m) for n in frames for m in mel]
        return [*spectra, *(x.mT.contiguous() for x in spectra)]

    def latents(self) -> list[Tensor]:
        """Of images, of videos, of sounds, and sequences of them."""
        channels = self.sizes(
            "in_channels", "latent_channels", "in_chans", "in_dim", "in_visual_dim", "audio_in_channels", "io_channels",
            "latent_dim", "embedding_dim",
        )  # fmt: skip
        edges = [(6, 10), *((e, e) for e in self.sizes("sample_size", "image_size")), (8, 8), (16, 16)]
        found = []
        for c in channels or [4]:
            found.append(self.normal(self.batch, 35, c))
            found += [self.normal(self.batch, c, *edge) for edge in edges]
            found += [self.normal(self.batch, c, frames, *edge) for frames in (3, 4) for edge in edges[:2]]
            found += [self.normal(self.batch, frames, c, *edge) for frames in (3, 4) for edge in edges[:2]]
            found += [self.normal(self.batch, c, 35), self.normal(self.batch, c)]
        return found

    def contexts(self) -> list[Tensor]:
        widths = self.numbers(*CONTEXTS)
        lengths = [TEXT, *self.sizes("max_text_seq_length", "num_embeddings", "text_len"), 35]
        return [self.normal(self.batch, length, width) for length in lengths for width in widths if width > 3]

    def labels(self) -> list[Tensor | None]:
        """Of tokens, of a decoder, of what is heard or seen; none, if none will do."""
        classes = self.classes(2)
        if self.main == "pixel_values":
            return [classes, None]
        if self.main != "input_ids":
            return [self.ids(5), self.ids(self.target), classes, None]
        target = self.ids(self.target)
        target[1:, -4:] = IGNORED
        tokens = self.ids(self.length)
        tokens[1:, self.kept :] = IGNORED
        decodes = bool(self.tree.get("is_encoder_decoder"))
        return [target, tokens, classes, None] if decodes else [tokens, classes, None]

    def padding(self) -> Tensor:
        """A mask that hides the end of every row but the first."""
        kept = torch.tensor([self.length, *[self.kept] * (self.batch - 1)])
        return (torch.arange(self.length) < kept[:, None]).long()


def _steps(maker: Maker) -> list[Tensor]:
    steps = torch.tensor([400.0, 20.0], dtype=torch.get_default_dtype())
    return [steps, steps / 1000, steps.long()]


def _ids(maker: Maker) -> list[Tensor]:
    """Of tokens, and of tokens that have several codes: each a dimension, or a row."""
    codes = [n + more for n in maker.sizes("num_codebooks") for more in (0, 1)]
    several = [maker.ids(maker.length, n) for n in codes]
    return [maker.ids(maker.length), *several, *(x.mT.flatten(0, 1) for x in several)]


def _masks(maker: Maker) -> list[Tensor | None]:
    mask = torch.ones(maker.batch, TEXT, dtype=torch.bool)
    return [mask, mask.long(), None]


# An input that is needed; one that is None in `OPTIONAL` may be left out.
REQUIRED: dict[str, Callable[[Maker], list[Any]]] = {
    "cap_feats": lambda m: [list(x) for x in m.contexts()],
    "decoder_input_ids": lambda m: [m.ids(m.target)],
    "encoder_hidden_states": Maker.contexts,
    "encoder_mask": _masks,
    "hidden_states": Maker.latents,
    "input_features": Maker.sound,
    "input_ids": _ids,
    "input_values": lambda m: [
        m.normal(m.batch, 900),
        m.normal(m.batch, 14_400),
        *m.sound(),
        m.normal(m.batch, 1, 14_400),
    ],
    "inputs": lambda m: [m.ids(m.length), *m.images(), m.normal(m.batch, 900)],
    "inputs_embeds": lambda m: [m.normal(m.batch, TEXT, w) for w in m.sizes("hidden_size")],
    "pixel_values": Maker.images,
    "position_ids": lambda m: [torch.arange(m.length).expand(m.batch, m.length), m.normal(35 + TEXT, 3).abs() * 5],
    "proj_embedding": lambda m: [m.normal(m.batch, w) for w in m.numbers("embedding_dim")],
    "timestep": _steps,
    "timestep_r": _steps,
    "r_timestep": _steps,
    "t": _steps,
    "x": lambda m: [list(x) for x in m.latents()],
}
OPTIONAL: dict[str, Callable[[Maker], list[Any]]] = {
    "attention_mask": lambda m: [m.padding(), None] if m.main == "input_ids" else [],
    "class_labels": lambda m: [m.classes(2), None],
    "crop_coords": lambda m: [torch.zeros(m.batch, 2)],
    "decoder_input_ids": lambda m: [None, m.ids(m.target)],
    "encoder_attention_mask": lambda m: _masks(m) if m.main is None else [],
    "encoder_hidden_states": lambda m: [*m.contexts(), None] if m.main is None else [],
    "encoder_hidden_states_mask": _masks,
    "guidance": lambda m: [m.normal(m.batch), None] if m.main is None else [],
    "height": lambda m: [5],
    "img_ids": lambda m: [m.normal(35, n).abs() * 5 for n in (3, 4)],
    "img_shapes": lambda m: [[[(1, 5, 7)]] * m.batch],
    "input_features": lambda m: [None, *m.sound()] if m.main == "input_ids" else [],
    "labels": Maker.labels,
    "num_frames": lambda m: [1],
    "original_size": lambda m: [torch.full((m.batch, 2), 64.0)],
    "pixel_attention_mask": lambda m: [None, torch.ones(m.batch, 35, dtype=torch.long)],
    "pooled_projections": lambda m: [m.normal(m.batch, w) for w in m.numbers("pooled_projection_dim")] + [None],
    "spatial_shapes": lambda m: [None, torch.tensor([[5, 7]] * m.batch)],
    "target_size": lambda m: [torch.full((m.batch, 2), 64.0)],
    "timestep": _steps,
    "txt_ids": lambda m: [m.normal(TEXT, n).abs() * 5 for n in (3, 4)],
    "width": lambda m: [7],
}
# by words of names, for those that are in neither
BY_WORDS: tuple[tuple[str, Callable[[Maker, str], list[Any]]], ...] = (
    ("mask", lambda m, name: [*_masks(m), torch.ones(m.batch, 35, dtype=torch.bool)]),
    ("(^|_)(timesteps?|time|sigma)$", lambda m, name: _steps(m)),
    ("_lens$|_lengths$", lambda m, name: [torch.tensor([TEXT, TEXT - 4])]),
    ("num_frames$", lambda m, name: [35]),
    ("pooled|global", lambda m, name: [*m.like(name), m.normal(m.batch, 16)]),
    ("drop$", lambda m, name: [torch.tensor([False, True])]),
    ("indices|_ids?$", lambda m, name: [torch.arange(3).expand(m.batch, 3), m.ids(35), m.ids(TEXT)]),
    ("hidden_states|latents|embeds|cond|text", lambda m, name: [*m.like(name), *m.latents()]),
)
