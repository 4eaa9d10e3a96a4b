"""torch's private interfaces: used where ARCHITECTURE.md says so, nowhere else, and all there in this torch."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import fx, nn
from torch.distributed._local_tensor import LocalTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from transformers import Trainer

import sptransform
from sptransform.compiler.caches import sources
from tests.support.own_ops import rms_norm

PACKAGE = Path(sptransform.__file__).parent
# how the code writes what torch calls otherwise
MODULES = {
    "aten": "torch.ops.aten",
    "distributed_c10d": "torch.distributed.distributed_c10d",
    "inductor": "torch._inductor.config",
    "nn": "torch.nn",
    "torch": "torch",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and not name.startswith("_sptransform")


def used_in(source: str) -> Iterator[str]:
    """Every name that a file takes from inside of torch: the path of a module's, ``._name`` of an object's."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} | {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store)
    }
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("delattr", "getattr", "hasattr", "setattr"):
            names = [f".{node.args[1].value}"] if isinstance(node.args[1], ast.Constant) else []
        elif isinstance(node, ast.Attribute) and node not in inner:
            names = _attribute(node, own)
        for name in names:
            if any(map(is_private, name.split("."))):
                yield name.removesuffix(".default")


def _attribute(node: ast.expr, own: set[str]) -> list[str]:
    path = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    root = node.id if isinstance(node, ast.Name) else ""
    if root in MODULES:
        return [".".join((MODULES[root], *path))]
    found = [name for name in path if is_private(name)]
    return [f".{name}" for name in found if root not in ("self", "cls") or name not in own]


def table() -> dict[str, set[str]]:
    """File -> names, of the table in ARCHITECTURE.md."""
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    section = text.split("## torch's private interfaces")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (.+?) \| .+ \|$", section, re.MULTILINE)
    return {file: set(re.findall(r"`([^`]+)`", names)) for file, names in rows}


def test_the_table_is_complete() -> None:
    found = {}
    for file in sources(PACKAGE):
        if names := set(used_in(file.read_text())):
            found[str(file.relative_to(PACKAGE))] = names
    assert found == table()


def names(of_objects: bool) -> list[str]:
    """All names of the table that are attributes of objects, or those that are not."""
    return sorted({name for names in table().values() for name in names if (name[0] == ".") == of_objects})


@pytest.mark.parametrize("name", names(of_objects=False))
def test_a_name_is_there(name: str) -> None:
    if name.startswith("torch.ops."):  # where torch makes what it is asked for
        namespace, *op = name.removeprefix("torch.ops.").split(".")
        known = torch._C._dispatch_get_all_op_names()
        wanted = "::".join((namespace, *op))
        overload = f"{namespace}::{'.'.join(op)}"
        assert any(each.split(".")[0] == wanted or each.startswith(f"{wanted}::") or each == overload for each in known)
        return
    module, rest = "torch", name.split(".")[1:]
    value: Any = torch
    while rest:
        part = rest.pop(0)
        module = f"{module}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(module)


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
    "._load_optimizer_and_scheduler": lambda: Trainer,
    "._local_tensor": a_dtensor,
    "._local_tensors": lambda: LocalTensor({0: torch.ones(2)}),
    "._orig_mod": lambda: torch.compile(nn.Linear(2, 2)),
    "._opoverload": lambda: rms_norm,
    "._parameters": lambda: nn.Linear(2, 2),
    "._post_accumulate_grad_hooks": lambda: torch.ones(2, requires_grad=True),
    "._prepare_tp": lambda: Accelerator,
    "._rename": lambda: fx.Graph().placeholder("x"),
    "._save": lambda: Trainer,
    "._save_optimizer_and_scheduler": lambda: Trainer,
    "._schema": lambda: torch.ops.aten.add.Tensor,
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
