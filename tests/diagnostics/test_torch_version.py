"""Which versions of torch are taken, refused, or warned of, and when."""

from __future__ import annotations

import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch

from sptransform import UsageError
from sptransform.diagnostics import private_api
from sptransform.diagnostics.torch_version import check_torch_version
from tests.support.golden import Golden


@pytest.mark.parametrize("version", ["2.11.0rc1", "2.12.1+cu130", "2.13.0+cpu", "2.13.1a0", "2.15.1"])
def test_supported(version: str) -> None:
    with mock.patch.object(torch, "__version__", version), warnings.catch_warnings():
        warnings.simplefilter("error")
        check_torch_version()


def test_an_older_one_is_refused(golden: Golden) -> None:
    with mock.patch.object(torch, "__version__", "2.10.1"), pytest.raises(UsageError) as error:
        check_torch_version()
    golden.check("torch_too_old", message=str(error.value))


def test_of_a_newer_one_the_user_is_told_what_it_does_not_have(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"graph/a.py": {"torch._guards.gone", "._schema"}, "ops/b.py": {"torch._guards.gone", "torch._guards"}}
    monkeypatch.setattr(private_api, "names_by_file", lambda: names)
    monkeypatch.setattr(torch, "__version__", "2.99.0a0+git1")
    with pytest.warns(UserWarning) as told:
        check_torch_version()
    monkeypatch.setattr(private_api, "names_by_file", dict)
    with pytest.warns(UserWarning) as told_of_none:
        check_torch_version()
    golden.check("torch_too_new", message=str(told[0].message), nothing_is_missing=str(told_of_none[0].message))


PROGRAM = """
import torch._dynamo
torch.__version__ = "2.99.0"
del torch._guards.CompileContext
import sptransform
"""


@pytest.mark.slow
def test_the_user_is_told_before_an_import_fails() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    signs = ("UserWarning", "torch._guards.CompileContext (compiler/compiles.py)", "ImportError: cannot import")
    told, named, failed = map(found.stderr.find, signs)
    assert 0 <= told < named < failed, found.stderr
