"""Where a node comes from: the user's source line, and the module whose forward made it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n(?P<code>.*)')


def source_line(node: fx.Node) -> str | None:
    """``file:line: code`` of the innermost frame of the user's stack outside of torch, if capture recorded one."""
    return innermost_line(node.meta.get("stack_trace") or "")


def place(node: fx.Node) -> str:
    """The same without folders, which differ from machine to machine: for texts that are part of a program."""
    file, colon, line = (source_line(node) or "unknown line").partition(":")
    return file.rpartition("/")[2] + colon + line


def innermost_line(stack: str) -> str | None:
    """``file:line: code`` of the innermost frame outside of torch of a stack as Python prints it."""
    frames = list(_FRAME.finditer(stack))
    if not frames:
        return None
    last = next((frame for frame in reversed(frames) if not frame["file"].startswith(_TORCH)), frames[-1])
    return f"{last['file']}:{last['line']}: {last['code'].strip()}"


def without_folders(line: str) -> str:
    """A source line without the folders of an installed package or of the working directory."""
    line = re.sub(r"^\S*/(site|dist)-packages/(\S+/)?", "", line)
    return line.removeprefix(f"{Path.cwd()}/")


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made the node: ``model.layers.0.self_attn``; "" for the root.

    A node of a backward has the path of the forward's node whose gradient it is part of.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    # Dynamo writes L['self']._modules['model'].layers._modules['0']; people write model.layers.0
    path = re.sub(r"^L\['\w+'\](\[\d+\])?", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]", lambda m: f".{m[1] or m[2] or m[3]}", path)
    return path.strip(".")
