"""Make a configuration small: one rule for every architecture, by what the fields of configurations are called.

Values are divided, so that ratios and products stay as they are. With ``heads`` and ``head_size`` the divisors of the
number of heads and of their size, any other width is divided by their product: heads x head size is then the hidden
size where it was before, key heads are the same share of heads, and towers that meet still fit.

1. Layers: two, or as many as show each kind once, where lists say of each layer what it is. Of all those lists the
   same layers are kept, and lists of layers' numbers are numbered anew.
2. Heads, their sizes, widths: divided as above. Parts of a head (rotary sections) keep their ratio.
3. Vocabularies, positions, windows, experts, periods of layers, images: at most so many. Tokens with a meaning get
   numbers inside of the vocabulary, different ones as before.
4. What makes a step random, and caches for generation: off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# at most; 144 positions are a square, since some count the patches of an image
MOST = {"vocabulary": 96, "codes": 64, "positions": 144, "window": 16, "experts": 8, "groups": 4, "chosen": 2}
IMAGE, STAGED_IMAGE, PATCH, PATCHES = 24, 64, 4, 6
LEAST_HEADS, LEAST_WIDTH = 4, 32

Tree = dict[str, Any]


@dataclass(frozen=True)
class Divisors:
    """What numbers of heads are divided by, and sizes of heads; widths by both."""

    heads: int
    head_size: int

    @property
    def width(self) -> int:
        return self.heads * self.head_size


def words(name: str) -> set[str]:
    return set(name.lower().strip("_").split("_"))


def kind_of(name: str) -> str | None:
    """What the field of that name is; the first that fits."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name.lower())), None)


# the order matters: a "num_hidden_layers" has the word of a width too
KINDS = (
    ("token", r"(_token|^(unk|mask|pad|bos|eos|sep|cls|lang))_?(id|ids|index)$|_token_(id|index)|^(boi|eoi|eoa|boa)_"),
    ("random", r"drop|jitter|_pdrop|^mask_(time|feature)_prob|^apply_spec_augment"),
    ("codes", r"codebook_size"),
    ("vocabulary", r"vocab_sizes?|_vocab$|num_embeds"),
    (
        "kept",
        r"num_labels|mel_bins|feat_per_channel|kernel|stride|norm_num_groups|^num_labels|pretraining_tp|sampling"
        r"|label_names|theta|conv_pos_embedding|feature_size|input_feat_size|interpolation_scale|ratio"
        r"|time_step_(min|max)",
    ),
    ("period", r"period$|interval$|_step$|every_n_layers$|sliding_window_pattern$|frequency$"),
    ("offset", r"^first_k_|_offset$|layer_start_index|^num_dense_layers"),
    ("experts", r"experts$|expert_num$|experts_num"),
    ("chosen", r"experts?_per_tok|top_?k(_group)?$|moe_k$"),
    ("groups", r"n_group$|expert_groups?$"),
    ("head groups", r"^(mamba_)?n_?groups$"),
    ("parts", r"section|axes_dims?|axes_lens|rope_dim|_dims_rope"),
    ("head size", r"head_?(dim|size)|dim_head|d_head|^d_kv$|kv_channels|rotary_dim"),
    ("heads", r"heads?(_per_layer)?$|num_query_groups"),
    (
        "layers",
        r"layers?$|^((?!min)\w+_)?depths?$|^num_((?!random)\w+_)?blocks$|_layers_per_|^n_blocks$|layers_per_stack"
        r"|stage_num_blocks|num_block_repeats|block_sizes|n_attn_blocks",
    ),
    ("patch", r"^(patch_size|encoder_stride)$"),
    ("image", r"^(image|img|crop|sample)_size$"),
    ("window", r"window|chunk|local_attention$"),
    (
        "positions",
        r"position_embeddings|positions$|^n_ctx$|seq_len|max_length|context_length|max_pos_emb|image_seq_length",
    ),
    (
        "width",
        r"size|dims?$|width|^d_|d_ssm|hidden|channels?|rank|ffn|inner|features$|units|embd|intermediate|latents$|dff|planes|groups$|filters$",
    ),
)


@dataclass(frozen=True)
class Form:
    """How small, and how; where one form of an architecture does not run, another may.

    Attributes:
        layers: the least number of layers.
        head_size: the least size of a head.
        share: all parts of the configuration are divided alike, so that widths that meet stay equal; else each by
            itself.
        filled: fields that are None get what their kind has elsewhere.
        channels: numbers of channels are divided too; they may be sums that a division by parts does not keep.
    """

    layers: int = 2
    head_size: int = 8
    share: bool = True
    filled: bool = False
    channels: bool = True


def shrunk(tree: Tree, form: Form) -> Tree:
    """The configuration made small."""
    if form.filled:
        tree = _filled(tree)
    common = divisors_of(list(nodes(tree)), form.head_size) if form.share else None
    return _shrunk(tree, form, common, _renumbered(tree))


def nodes(tree: Tree) -> Iterator[Tree]:
    """The configuration, and those in it."""
    yield tree
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from nodes(dict(value))


def _shrunk(tree: Tree, form: Form, common: Divisors | None, tokens: dict[int, int]) -> Tree:
    divisors = common or divisors_of([tree], form.head_size)
    kept = kept_layers(tree, form.layers)
    staged = any(kind_of(name) == "layers" and isinstance(value, list) for name, value in tree.items())
    windowed = any(kind_of(name) == "window" for name in tree)  # an image of as many windows as before
    found: Tree = {}
    for name, value in tree.items():
        if staged and windowed and kind_of(name) == "image":
            found[name] = value
        elif isinstance(value, Mapping):
            found[name] = _shrunk(dict(value), form, common, tokens)
        elif isinstance(value, list) and kept and len(value) == kept[0]:
            found[name] = [_value(name, value[at], divisors, tokens, form, staged) for at in kept[1]]
            if _numbers_of_layers(name, value, kept[0]):
                found[name] = list(range(len(kept[1])))
        elif isinstance(value, list) and kept and _numbers_of_layers(name, value, kept[0]):
            found[name] = [kept[1].index(at) for at in value if at in kept[1]] or [len(kept[1]) - 1]
        elif isinstance(value, list) and kind_of(name) == "parts":
            found[name] = _parts(value, divisors.head_size)
        elif isinstance(value, list):
            found[name] = [_value(name, each, divisors, tokens, form, staged) for each in value]
        elif kept and kind_of(name) == "layers" and value == kept[0] and not isinstance(value, bool):
            found[name] = len(kept[1])
        else:
            found[name] = _value(name, value, divisors, tokens, form, staged)
    if isinstance(tree.get("image_size"), int) and isinstance(tree.get("patch_size"), int) and not staged:
        found["image_size"] = found["patch_size"] * min(PATCHES, tree["image_size"] // tree["patch_size"])
    return found


def _value(name: str, value: Any, divisors: Divisors, tokens: dict[int, int], form: Form, staged: bool) -> Any:
    kind = kind_of(name)
    if kind == "random" and isinstance(value, int | float) and value is not None:
        return type(value)(0)
    if name == "use_cache":
        return False
    if isinstance(value, bool) or not isinstance(value, int) or value <= 1:
        return value
    match kind:
        case "token":
            return tokens.get(value, value)
        case "layers":
            return min(value, form.layers)
        case "period":
            return min(value, 2)
        case "offset":
            return 1
        case "heads":
            return max(value // divisors.heads, 1)
        case "head groups":
            return max(value // divisors.heads, 2)
        case "head size":
            return _divided(value, divisors.head_size)
        case "width" if name.endswith("channels") and not form.channels:
            return value
        case "width" if value >= LEAST_WIDTH:
            return _divided(value, divisors.width)
        case "patch":
            return value if staged else min(value, PATCH)
        case "image":
            return min(value, STAGED_IMAGE if staged else IMAGE)
    most = MOST.get(kind or "")
    return value if most is None else min(value, most)


def _divided(value: int, divisor: int) -> int:
    """By ``divisor`` if that goes; else about so much, and a multiple of 8."""
    return value // divisor if value % divisor == 0 else 8 * max(1, math.ceil(value / divisor / 8))


def _are_ints(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) for value in values)


def _parts(values: list[Any], divisor: int) -> list[Any]:
    """Parts of the size of a head, or of half of it, divided, and even if they were; the first gets what is left."""
    if not _are_ints(values) or sum(values) // divisor < len(values):
        return values
    total = sum(values) // divisor
    even = all(value % 2 == 0 for value in values) and total >= 2 * len(values)
    found = [max(value // divisor // 2 * 2, 2) if even else max(value // divisor, 1) for value in values]
    found[0] += total - sum(found)
    return found


def divisors_of(trees: list[Tree], head_size: int) -> Divisors:
    """The largest by which all heads, and all sizes of heads, can be divided and are not too few, or too small."""
    heads, sizes = [], []
    for tree in trees:
        flat = [(name, v) for name, value in tree.items() for v in (value if isinstance(value, list) else [value])]
        ints = [(name, v) for name, v in flat if isinstance(v, int) and not isinstance(v, bool) and v > 0]
        heads += [v for name, v in ints if kind_of(name) == "heads"]
        own = [v for name, v in ints if kind_of(name) == "head size"]
        own = own or [width // number for width, number in _hidden_and_heads(tree) if width % number == 0]
        sizes += own or [sum(v) for name, v in tree.items() if kind_of(name) == "parts" and _are_ints(v)]
    if not heads and not sizes:  # layers without attention: the hidden size is one head
        sizes = [width for tree in trees for width in _hidden(tree)]
        head_size = LEAST_WIDTH
    return Divisors(_largest(heads, LEAST_HEADS, 2), _largest(sizes, head_size, 4))


def _largest(values: list[int], most: int, least: int) -> int:
    """The largest divisor that leaves the largest value at least ``most``, and no value below ``least``."""
    if not values:
        return 1
    common = math.gcd(*values)
    fits = (d for d in range(common, 0, -1) if common % d == 0)
    return next(
        (d for d in fits if max(values) // d >= most and all(v // d >= min(v, least) for v in values)),
        1,
    )


def _hidden(tree: Tree) -> list[int]:
    """The hidden size; of models in stages, that of each."""
    found = next((tree[n] for n in ("hidden_size", "d_model", "n_embd", "dim", "embed_dim") if tree.get(n)), [])
    return [x for x in (found if isinstance(found, list) else [found]) if isinstance(x, int)]


def _hidden_and_heads(tree: Tree) -> Iterator[tuple[int, int]]:
    """Widths of which heads are parts, with the number of heads."""
    heads = next((value for name, value in tree.items() if kind_of(name) == "heads" and value), [])
    numbers = [x for x in (heads if isinstance(heads, list) else [heads]) if isinstance(x, int)]
    widths = _hidden(tree)
    yield from zip(widths * len(numbers) if len(widths) == 1 else widths, numbers, strict=False)


def kept_layers(tree: Tree, least: int) -> tuple[int, list[int]] | None:
    """The number of layers, and those that are kept: the first of every kind, at least so many. None without layers."""
    counts = [v for name, v in tree.items() if kind_of(name) == "layers" and isinstance(v, int) and v > 1]
    if not counts:
        return None
    number = max(counts)
    about = [v for name, v in tree.items() if isinstance(v, list) and len(v) == number]
    about = [v for v in about if v != list(range(number))]
    kinds = list(zip(*(map(repr, values) for values in about), strict=True)) or [()] * number
    first = [at for at in range(number) if kinds.index(kinds[at]) == at]
    others = [at for at in range(number) if at not in first]
    return number, sorted(first + others[: max(0, least - len(first))])


def _numbers_of_layers(name: str, values: list[Any], number: int) -> bool:
    """Whether these are the numbers of layers."""
    named = bool(words(name) & {"idx", "idxs", "index", "indices", "indexes", "ids", "layers"})
    ints = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    return named and ints and len(set(values)) == len(values) > 0 and max(values) < number


def _renumbered(tree: Tree) -> dict[int, int]:
    """Numbers of special tokens outside of the small vocabulary, and the ones they get."""
    found: dict[int, int] = {}
    for node in nodes(tree):
        for name, value in node.items():
            for each in value if isinstance(value, list) else [value]:
                if kind_of(name) == "token" and isinstance(each, int) and each >= MOST["vocabulary"] - 1:
                    found.setdefault(each, MOST["vocabulary"] - 2 - len(found))
    return found


def _filled(tree: Tree) -> Tree:
    """What is None by what its kind has elsewhere in the configuration: heads as heads, widths as the hidden size.

    The default of some things is the first of them.
    """
    hidden, heads = next(_hidden_and_heads(tree), (None, None))
    usual = {**MOST, "heads": heads, "width": hidden, "channels": 4, "patch": 2, "image": IMAGE, "token": 1}
    if isinstance(hidden, int) and isinstance(heads, int):
        usual |= {"head size": hidden // heads, "parts": [hidden // heads // 2] * 2}
    found = {name: _filled(dict(v)) if isinstance(v, Mapping) else v for name, v in tree.items()}
    kinds = {name: "channels" if name.endswith("channels") else kind_of(name) for name in tree}
    firsts = {f"default_{name.removesuffix('s')}": v[0] for name, v in tree.items() if isinstance(v, list) and v}
    return {name: firsts.get(name, usual.get(kinds[name] or "")) if v is None else v for name, v in found.items()}
