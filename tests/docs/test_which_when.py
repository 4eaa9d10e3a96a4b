"""docs/which_when.md is what docs/which_when.py writes now."""

import importlib.util
import sys

import pytest

from tests.support.pages import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")  # where what it shares with other scripts is
    spec = importlib.util.spec_from_file_location("which_when", ROOT / "docs" / "which_when.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "python docs/which_when.py"
