"""The checks of `make gpu` as tests, on a machine with a CUDA device."""

import pytest
import torch

from tests.gpu.figures import Check
from tests.gpu.groups import GROUPS

HAS_GPU = torch.cuda.is_available()
CHECKS = [check for of_group in GROUPS.values() for check in of_group("cuda")] if HAS_GPU else []


@pytest.mark.cuda
@pytest.mark.timeout(480)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.group}: {check.name}")
def test_gpu(check: Check) -> None:
    assert not check.figures()["wrong"]
