"""`make docs`: the pages build without a warning, and what is built fetches nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sptransform
from tests.support.pages import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

# what a browser loads by itself; a link to click is none of it
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?(?:https?:)?//"""
)


def test_the_site(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr
    pages = {page.name: page.read_text() for page in tmp_path.glob("*.html")}
    assert {"index.html", "architecture.html", "supported_models.html"} <= pages.keys()
    for name, html in pages.items():
        assert not _LOADED.search(html), name
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", style.read_text()), style
    for name in sptransform.__all__:
        assert f'id="sptransform.{name}"' in pages["api.html"], name
    assert ":class:" not in pages["api.html"]
    assert (tmp_path / "examples" / "own_rule.py").exists()
