"""Which differences from one device are rounding. It is not guessed from their size alone:

1. What is computed in float64 throughout differs by less than ``TOLERANCE_IN_DOUBLE``.
2. Where a model computes in float32 inside of float64, a difference below ``TOLERANCE`` is rounding.
3. A larger one there is judged on the same graph with every float32 in it replaced by float64, on ranks and on one
   device. Rounding is then below ``TOLERANCE_IN_DOUBLE``; a mistake stays what it was.
4. A model that does not run in float64 may differ ``ROUNDINGS`` times as much as one device does from itself when every
   parameter moves by a rounding.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

# Private: the tensors in whatever a function returns
from torch.utils import _pytree as pytree

from sptransform.diagnostics.provenance import without_folders

TOLERANCE = 1e-6
TOLERANCE_IN_DOUBLE = 1e-9
ROUNDINGS = 8.0

NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = ("float", "bfloat16", "half")
_LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, Path(__file__).parent))


def put_in_double(gm: fx.GraphModule) -> None:
    """Make whatever the graph of Dynamo computes in, or casts to, with fewer bits, a float64."""

    def doubled(argument: Any) -> Any:
        return torch.float64 if isinstance(argument, torch.dtype) and argument in NARROW else argument

    for part in (each for each in gm.modules() if isinstance(each, fx.GraphModule)):
        for node in part.graph.nodes:
            if node.op == "call_method" and node.target in _CASTS:
                node.target = "double"
            elif node.op in ("call_method", "call_function"):
                node.args = fx.node.map_aggregate(node.args, doubled)
                node.kwargs = fx.node.map_aggregate(node.kwargs, doubled)
        part.recompile()
    gm.double()


@contextmanager
def moved_by_roundings(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Every entry is moved by at most one rounding inside of the block."""
    generator = torch.Generator().manual_seed(4)
    kept = [(p, p.detach().clone()) for p in parameters]
    with torch.no_grad():
        for p, _ in kept:
            if p.is_floating_point():
                p.mul_(1 + torch.finfo(p.dtype).eps * (torch.rand(p.shape, generator=generator) - 0.5))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


class NarrowFloats(TorchFunctionMode):
    """Notes the first function whose result has fewer bits than float64: ``first`` is its dtype and the user's line."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.first is None:
            dtypes = [x.dtype for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            narrow = next((dtype for dtype in dtypes if dtype in NARROW), None)
            if narrow is not None:
                self.first = " ".join(filter(None, (str(narrow).removeprefix("torch."), _line_outside())))
        return result


def _line_outside() -> str | None:
    """``at file:line: code`` of the innermost frame that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_LIBRARIES) and Path(frame.filename).is_file():
            return f"at {without_folders(f'{frame.filename}:{frame.lineno}: {frame.line}')}"
    return None
