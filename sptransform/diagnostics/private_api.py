"""What this package takes from inside of torch, as its own sources say, and whether the installed torch has it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from typing import Any

from sptransform.diagnostics.sources import PACKAGE, sources

# how the code writes what torch calls otherwise
MODULES = {
    "aten": "torch.ops.aten",
    "distributed_c10d": "torch.distributed.distributed_c10d",
    "inductor": "torch._inductor.config",
    "nn": "torch.nn",
    "torch": "torch",
}


def names_by_file() -> dict[str, set[str]]:
    """File of the package -> the private names of torch that it uses; files without any are left out."""
    found = {str(file.relative_to(PACKAGE)): set(used_in(file.read_text())) for file in sources()}
    return {file: names for file, names in found.items() if names}


def missing() -> dict[str, list[str]]:
    """Name that this torch does not have -> the files that use it. Attributes of objects are not looked for."""
    found: dict[str, list[str]] = {}
    for file, names in names_by_file().items():
        for name in sorted(names):
            if not is_of_objects(name) and not is_there(name):
                found.setdefault(name, []).append(file)
    return found


def is_of_objects(name: str) -> bool:
    """Whether it is an attribute of an object, ``._schema``: no module has it."""
    return name.startswith(".")


def is_there(name: str) -> bool:
    """Whether this torch has a module, an attribute of one, or an op of this name."""
    path, *parts = name.split(".")
    value: Any = importlib.import_module(path)
    for part in parts:
        path = f"{path}.{part}"
        try:
            value = getattr(value, part)
        except (AttributeError, ImportError):  # torch imports some modules when they are asked for
            if path.startswith("torch.ops."):  # namespaces of ops are no packages
                return False
            try:
                value = importlib.import_module(path)
            except ImportError:
                return False
    return True


def used_in(source: str) -> Iterator[str]:
    """Every name that a file takes from inside of torch: the path of a module's, ``._name`` of an object's."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)} | {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in nodes
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store)
    }
    inner = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME:
            names = [f".{node.args[1].value}"] if isinstance(node.args[1], ast.Constant) else []
        elif isinstance(node, ast.Attribute) and node not in inner:
            names = _attribute(node, own)
        for name in names:
            if any(map(_is_private, name.split("."))):
                yield name.removesuffix(".default")


_BY_NAME = ("delattr", "getattr", "hasattr", "setattr")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and not name.startswith("_sptransform")


def _attribute(node: ast.expr, own: set[str]) -> list[str]:
    path = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    root = node.id if isinstance(node, ast.Name) else ""
    if root in MODULES:
        return [".".join((MODULES[root], *path))]
    found = [name for name in path if _is_private(name)]
    return [f".{name}" for name in found if root not in ("self", "cls") or name not in own]
