"""torch's private interfaces: used where ARCHITECTURE.md says so, nowhere else, and all there in this torch."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import sptransform

ROOT = Path(sptransform.__file__).parents[1]
FILES = sorted([*(ROOT / "sptransform").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
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
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
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
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.split("## torch's private interfaces")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (.+?) \| .+ \|$", section, re.MULTILINE)
    return {file: set(re.findall(r"`([^`]+)`", names)) for file, names in rows}


def test_the_table_is_complete() -> None:
    found = {}
    for file in FILES:
        if (ROOT / "sptransform" / "passes") not in file.parents:
            names = set(used_in(file.read_text()))
            if names:
                found[str(file.relative_to(ROOT)).removeprefix("sptransform/")] = names
    assert found == table()


@pytest.mark.parametrize("name", sorted({name for names in table().values() for name in names if name[0] != "."}))
def test_a_name_is_there(name: str) -> None:
    module, rest = "torch", name.split(".")[1:]
    value: Any = torch
    while rest:
        part = rest.pop(0)
        module = f"{module}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(module)


def test_the_attributes_of_objects_are_there() -> None:
    """By name: an object that has it, in the way it is used."""
    overload = torch.ops.aten.add.Tensor
    x = torch.ones(2, requires_grad=True)
    length = torch.ones(3)
    if not dist.is_initialized():
        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        part = DTensor.from_local(length, mesh, [Replicate()])
        local = part._local_tensor
        dist.destroy_process_group()
        assert torch.equal(local, length)
    assert [argument.name for argument in overload._schema.arguments] == ["self", "other", "alpha"]
    assert overload._overloadname == "Tensor"
    assert x.untyped_storage()._cdata == x.detach().untyped_storage()._cdata
    assert not x._backward_hooks and not x._post_accumulate_grad_hooks
    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None and set(module._parameters) == {"weight", "bias"}
    assert torch.equal(module._call_impl(x), module(x))
    assert type(torch.compile(torch.sin, backend="aot_eager")(x).grad_fn)._forward_cls.__name__ == "CompiledFunction"
    node = fx.Graph().placeholder("x")
    node._rename("y")
    assert node.name == "y"


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
