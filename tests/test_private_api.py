"""torch's private interfaces: used where ARCHITECTURE.md says so, nowhere else, and all there in this torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import fx, nn
from torch.distributed._local_tensor import LocalTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from transformers import Trainer

from sptransform.diagnostics.private_api import is_of_objects, is_there, names_by_file, used_in
from sptransform.diagnostics.sources import PACKAGE
from tests.support.own_ops import rms_norm


def table() -> dict[str, set[str]]:
    """File -> names, of the table in ARCHITECTURE.md."""
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    section = text.split("## torch's private interfaces")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (.+?) \| .+ \|$", section, re.MULTILINE)
    return {file: set(re.findall(r"`([^`]+)`", names)) for file, names in rows}


def test_the_table_is_complete() -> None:
    assert names_by_file() == table()


def names(of_objects: bool) -> list[str]:
    """All names of the table that are attributes of objects, or those that are not."""
    return sorted({name for names in table().values() for name in names if is_of_objects(name) == of_objects})


@pytest.mark.parametrize("name", names(of_objects=False))
def test_a_name_is_there(name: str) -> None:
    assert is_there(name)


@pytest.mark.parametrize(
    "name",
    [
        "torch._no_module",
        "torch._guards.NoClass",
        "torch._dynamo.exc.Unsupported._no_attribute",
        "torch.ops.aten._no_op",
        "torch.ops.aten._softmax.no_overload",
    ],
)
def test_a_name_is_not_there(name: str) -> None:
    assert not is_there(name)


def a_dtensor() -> DTensor:
    """Of one rank; it needs no process group."""
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    return DTensor.from_local(torch.ones(2), mesh, [Replicate()], run_check=False)


# An object that has the attribute, in the way it is used.
OBJECTS: dict[str, Callable[[], Any]] = {
    "._ChunkedLogProbFunction": lambda: pytest.importorskip("trl.trainer.utils"),
    "._backward_hooks": lambda: torch.ones(2, requires_grad=True),
    "._call_impl": lambda: nn.Linear(2, 2),
    "._cdata": lambda: torch.ones(2).untyped_storage(),
    "._compiled_call_impl": lambda: nn.Linear(2, 2),
    "._forward_cls": lambda: torch.compile(torch.sin, backend="aot_eager")(torch.ones(2, requires_grad=True)).grad_fn,
    "._get_grad_norm": lambda: Trainer,
    "._get_num_items_in_batch": lambda: Trainer,
    "._load_optimizer_and_scheduler": lambda: Trainer,
    "._local_tensor": a_dtensor,
    "._local_tensors": lambda: LocalTensor({0: torch.ones(2)}),
    "._orig_mod": lambda: torch.compile(nn.Linear(2, 2)),
    "._models": lambda: Accelerator(cpu=True),
    "._opoverload": lambda: rms_norm,
    "._parameters": lambda: nn.Linear(2, 2),
    "._post_accumulate_grad_hooks": lambda: torch.ones(2, requires_grad=True),
    "._prepare_tp": lambda: Accelerator,
    "._rename": lambda: fx.Graph().placeholder("x"),
    "._save": lambda: Trainer,
    "._save_optimizer_and_scheduler": lambda: Trainer,
    "._schema": lambda: torch.ops.aten.add.Tensor,
    "._step_count": lambda: torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.ones(1)])),
    "._track_num_input_tokens": lambda: Trainer,
    "._use_triton": lambda: pytest.importorskip("trl.trainer.utils"),
}


def test_every_attribute_has_an_object() -> None:
    assert sorted(OBJECTS) == names(of_objects=True)


@pytest.mark.parametrize("name", OBJECTS)
def test_an_attribute_is_there(name: str) -> None:
    assert hasattr(OBJECTS[name](), name[1:])


def test_attributes_mean_what_they_meant() -> None:
    overload = torch.ops.aten.add.Tensor
    assert [argument.name for argument in overload._schema.arguments] == ["self", "other", "alpha"]
    x = torch.ones(2)
    assert x.untyped_storage()._cdata == x.view(1, 2).untyped_storage()._cdata
    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None and set(module._parameters) == {"weight", "bias"}
    assert torch.equal(module._call_impl(x), module(x))
    node = fx.Graph().placeholder("x")
    node._rename("y")
    assert node.name == "y"
    assert torch.equal(a_dtensor()._local_tensor, x)


def test_what_is_private_is_found() -> None:
    source = """
import torch._guards
from torch._dynamo import exc
y = torch.ops.aten.add._schema
self._own = self._own, self._inherited, x._cdata, getattr(x, "_base")
"""
    assert set(used_in(source)) == {
        "torch._guards",
        "torch._dynamo.exc",
        "torch.ops.aten.add._schema",
        "._cdata",
        "._base",
        "._inherited",
    }
