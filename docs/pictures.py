"""Draws the pictures of these pages: what the demo prints, and a page of `explain`. `python docs/pictures.py`

Text is drawn in whatever monospace font the reader has: nothing is fetched.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import torch.multiprocessing as mp
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import sptransform

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

import quickstart  # noqa: E402 - a script, beside which nothing is installed

_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # which would be fetched


def recorder(width: int) -> Console:
    return Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")


def save(console: Console, name: str, title: str) -> None:
    svg = console.export_svg(title=title, unique_id=name)
    (DOCS / "images" / f"{name}.svg").write_text(_FONTS.sub("", svg))


def demo() -> None:
    """The tables that the demo prints, of fewer steps."""
    args = Namespace(steps=6, world_size=4, seq_len=512, strategy="ulysses", backend="aot_eager")
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(quickstart.train, args=(args, directory), nprocs=args.world_size)
        losses = torch.load(f"{directory}/losses.pt")
    quickstart.console = console = recorder(74)
    quickstart.show_losses(*losses, args.world_size)
    quickstart.show_collectives(quickstart.rewritten_model(args))
    save(console, "demo", "make demo")


def explanation() -> None:
    """A page of `explain`, of a large model on meta."""
    with torch.device("meta"):
        config = LlamaConfig(
            num_hidden_layers=32,
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            vocab_size=128256,
        )
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, 131072, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids}
    console = recorder(150)
    console.print(sptransform.explain(model, "ring", inputs, world_size=8, outputs="loss"))
    save(console, "explain", 'explain(model, "ring", inputs, world_size=8, outputs="loss")')


if __name__ == "__main__":
    demo()
    explanation()
