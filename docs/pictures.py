"""Draws the pictures of the docs: what the demo, `explain` and `compare` print, and pages. `python docs/pictures.py`

Text is drawn in whatever monospace font the reader has: nothing is fetched. Pages are taken in headless Chromium.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
import torch.multiprocessing as mp
from large_model import inputs, llama_8b
from rich.console import Console

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
    """What `explain` prints of a large model."""
    console = recorder(150)
    console.print(sptransform.explain(llama_8b(), "ring", inputs(131072, 1), world_size=8, outputs="loss"))
    save(console, "explain", 'explain(model, "ring", inputs, world_size=8, outputs="loss")')


# picture -> its height, and what is done on the page before it is taken
_SHOW = "for (const each of document.querySelectorAll('main section')) each.hidden = !{sections}.includes(each.id);"
_RING = "document.querySelector('#ring button:last-child').click();"
_CONTIGUOUS = "document.querySelector('#layout button:nth-child(2)').click();"
_DARK = "document.documentElement.dataset.theme = 'dark';"
PAGES = {
    "page": (1720, _SHOW.format(sections="['side-by-side', 'layers']")),
    "page_graph": (1480, _SHOW.format(sections="['graph', 'tensors']")),
    "page_ring": (1010, _SHOW.format(sections="['rings', 'memory']") + _RING + _CONTIGUOUS),
    "page_dark": (1760, _SHOW.format(sections="['time', 'what-if']") + _DARK),
}


def pages() -> None:
    """What `compare` prints of the same model, and its page, part by part."""
    model = llama_8b()
    given = {"world_size": 8, "hardware": "h100-nvlink", "outputs": "loss"}
    compared = sptransform.compare(model, inputs(131072, 1), resized=inputs, **given)
    console = recorder(130)
    options = tuple(replace(option, formulas={}) for option in compared.options)  # which are many lines
    console.print(replace(compared, options=options))
    save(console, "compare", 'compare(model, inputs, world_size=8, hardware="h100-nvlink", outputs="loss")')
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "page.html"
        compared.html(page, title="Llama, 8B")
        photograph(page.read_text(encoding="utf-8"), Path(directory))


def photograph(page: str, directory: Path) -> None:
    """Take every picture of :data:`PAGES` of the text of a page."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars --disable-sync"
    flags += " --disable-background-networking --disable-component-update --virtual-time-budget=3000"
    for name, (height, script) in PAGES.items():
        shown = directory / f"{name}.html"
        shown.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        picture = [f"--window-size=1280,{height}", f"--screenshot={DOCS / 'images' / name}.png", shown.as_uri()]
        profile = f"--user-data-dir={directory / name}"
        subprocess.run([shutil.which("chromium"), *flags.split(), profile, *picture], check=True, capture_output=True)


if __name__ == "__main__":
    demo()
    explanation()
    pages()
