"""Configurations made small: ratios stay, each kind of layer stays, and what is special stays distinct."""

from __future__ import annotations

import pytest

from sptransform.sweep.shrinking import Form, kind_of, shrunk

TEXT = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 6,
    "layer_types": ["window", "window", "full", "window", "window", "full"],
    "full_layers": [2, 5],
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "attention_dropout": 0.1,
    "use_cache": True,
    "eos_token_id": [128_001, 128_009],
    "pad_token_id": 0,
    "rope_parameters": {"mrope_section": [16, 24, 24]},
}
VISION = {
    "hidden_size": 1024,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "depth": 24,
    "patch_size": 14,
    "image_size": 224,
}


def test_heads_and_widths_keep_their_ratios() -> None:
    small = shrunk(TEXT, Form())
    assert small["hidden_size"] == small["num_attention_heads"] * small["head_dim"]
    assert (small["num_attention_heads"], small["num_key_value_heads"], small["head_dim"]) == (8, 2, 8)
    assert small["intermediate_size"] * 4096 == small["hidden_size"] * 11_008
    assert sum(small["rope_parameters"]["mrope_section"]) * 2 == small["head_dim"]


def test_each_kind_of_layer_is_kept_once() -> None:
    small = shrunk(TEXT, Form())
    assert (small["num_hidden_layers"], small["layer_types"], small["full_layers"]) == (2, ["window", "full"], [1])
    assert shrunk(TEXT, Form(layers=4))["layer_types"] == ["window", "window", "full", "window"]


def test_what_is_random_is_off_and_tokens_stay_distinct() -> None:
    small = shrunk(TEXT, Form())
    assert (small["attention_dropout"], small["use_cache"]) == (0.0, False)
    tokens = [*small["eos_token_id"], small["pad_token_id"]]
    assert len(set(tokens)) == 3 and max(tokens) < small["vocab_size"]


def test_towers_that_meet_still_fit() -> None:
    small = shrunk({"text": TEXT, "vision": VISION}, Form())
    assert small["vision"]["out_hidden_size"] == small["text"]["hidden_size"]
    assert small["vision"]["image_size"] % small["vision"]["patch_size"] == 0


def test_what_is_none_is_filled_by_its_kind() -> None:
    given = TEXT | {"head_dim": None, "num_key_value_heads": None, "num_experts": None}
    small = shrunk(given, Form(filled=True))
    assert small["head_dim"] * small["num_attention_heads"] == small["hidden_size"]
    assert small["num_key_value_heads"] == small["num_attention_heads"] and small["num_experts"] > 1
    assert shrunk(given, Form())["head_dim"] is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("num_hidden_layers", "layers"), ("num_attention_heads", "heads"), ("qk_rope_head_dim", "head size"),
        ("moe_intermediate_size", "width"), ("image_token_id", "token"), ("num_experts_per_tok", "chosen"),
        ("sliding_window", "window"), ("sliding_window_pattern", "period"), ("num_mel_bins", "kept"),
        ("rms_norm_eps", None),
    ],
)  # fmt: skip
def test_a_field_is_known_by_its_name(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_groups_of_heads_and_their_widths_fit_the_heads() -> None:
    """As of state-space layers, whose numbers say how the heads share what they read."""
    small = shrunk({"n_heads": 128, "head_dim": 64, "n_groups": 8, "d_ssm": 8192}, Form())
    assert small == {"n_heads": 4, "head_dim": 8, "n_groups": 2, "d_ssm": 32}


def test_parts_of_a_head_say_its_size_where_nothing_else_does() -> None:
    assert shrunk({"model_dim": 2048, "axes_dims": [16, 24, 24]}, Form()) == {"model_dim": 256, "axes_dims": [4, 2, 2]}


def test_channels_stay_in_a_form_of_their_own() -> None:
    tree = {"num_heads": 16, "head_dim": 64, "in_channels": 36, "latent_channels": 16}
    assert shrunk(tree, Form(channels=False))["in_channels"] == 36 != shrunk(tree, Form())["in_channels"]


def test_what_is_none_is_filled() -> None:
    tree = {"languages": ["en", "de"], "default_language": None, "pad_token_id": None, "vocab_size": None}
    filled = shrunk(tree, Form(filled=True))
    assert filled["default_language"] == "en" and 0 < filled["pad_token_id"] < filled["vocab_size"]
    assert shrunk(tree, Form())["default_language"] is None
