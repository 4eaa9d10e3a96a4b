"""Every block kernel that is there, against the definition in float64: forward, backward, masks, windows, documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.ring.blocks import lay_out
from sptransform.ops.ring.kernels.interface import Case, Kernel, compute_dtype
from sptransform.ops.ring.kernels.reference import OPEN
from sptransform.ops.ring.kernels.table import TABLE
from tests.gpu.figures import BOUNDS, Check, Errors, relative_error

BATCH, HEADS, SCALE = 2, 4, 0.11
MORE = 40  # keys of another block, which every query sees
DIMS = ((64, 64), (128, 128), (80, 80), (256, 256), (192, 128), (20, 20))
KEY_HEADS = (4, 2)


@dataclass(frozen=True)
class Form:
    """How the queries of a block see its keys."""

    name: str
    queries: int
    keys: int
    causal: bool = False
    sliding: bool = False
    softcap: float = 0.0
    bias: Callable[[int, int, str], Tensor] | None = None

    @property
    def extra(self) -> dict[str, Any]:
        """The keyword arguments of a kernel."""
        return ({"sliding": True} if self.sliding else {}) | ({"softcap": self.softcap} if self.softcap else {})

    def case(self, query: Tensor, value: Tensor) -> Case:
        windowed = self.sliding or (self.causal and self.queries != self.keys)
        return Case.of(
            query, value, masked=self.bias is not None, explicit=False, softcap=self.softcap, windowed=windowed
        )


def _hidden(queries: int, keys: int, device: str) -> Tensor:
    """-inf at random, on all of a row, and on the rest of the keys of a sequence."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.rand(BATCH, 1, queries, keys, generator=generator) < 0.4
    hidden[:, :, 2] = True
    hidden[1, ..., keys // 2 :] = True
    return torch.zeros(hidden.shape).masked_fill(hidden, -math.inf).to(device)


def _added(queries: int, keys: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(1, HEADS, queries, keys, generator=generator).to(device)


def _off_the_grid(x: Tensor) -> Tensor:
    """A part of longer rows, which begins where no kernel can load 16 bytes."""
    return torch.cat([torch.full_like(x[..., :3], math.nan), x], -1)[..., 3:]


# how tensors lie in memory; heads of 64 come in every way, others as modules give them
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside": lambda x: lay_out(x, x.dtype),
    "heads first": Tensor.contiguous,
    "off the grid": _off_the_grid,
}

FORMS = (
    Form("full", 200, 333),
    Form("causal", 200, 200, causal=True),
    Form("causal with more keys", 200, 333, causal=True),
    Form("sliding", 200, 333, sliding=True),
    Form("window", 200, 333, causal=True, sliding=True),
    Form("one row", 1, 77),
    Form("hidden", 65, 77, bias=_hidden),
    Form("added", 128, 192, bias=_added),
    Form("softcap", 128, 192, softcap=0.7),
    Form("causal under a softcap", 200, 200, causal=True, softcap=0.7),
)


def checks(device: str) -> list[Check]:
    """One for every kernel and dtype that it serves."""
    found = []
    for kernel, dtype in itertools.product(TABLE, BOUNDS):
        if any(_served(kernel, dtype, device)):
            found.append(Check("kernels", f"{kernel.name}, {_named(dtype)}", partial(_blocks, kernel, dtype, device)))
            if kernel.varlen is not None:
                name = f"{kernel.name}, {_named(dtype)}, documents"
                found.append(Check("kernels", name, partial(_documents, kernel, dtype, device)))
    return found


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _served(kernel: Kernel, dtype: torch.dtype, device: str) -> Iterator[tuple[Form, tuple[int, int], int]]:
    for form, dims, key_heads in itertools.product(FORMS, DIMS, KEY_HEADS):
        query, value = (torch.empty(1, 1, 2, dim, dtype=dtype, device=device) for dim in dims)
        if kernel.serves(form.case(query, value)):
            if kernel.grouped or key_heads == HEADS:
                yield form, dims, key_heads


def _blocks(kernel: Kernel, dtype: torch.dtype, device: str) -> dict[str, Any]:
    errors = Errors(BOUNDS[dtype])
    for form, dims, key_heads in _served(kernel, dtype, device):
        for layout in list(LAYOUTS)[: len(LAYOUTS) if dims == (64, 64) else 1]:
            case = f"{form.name}, heads of {dims[0]} and {dims[1]}, {HEADS} of {key_heads}, {layout}"
            errors.add(case, partial(_compare, kernel, form, dims, key_heads, dtype, device, LAYOUTS[layout]))
    return errors.figures()


def _random(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def _compare(
    kernel: Kernel,
    form: Form,
    dims: tuple[int, int],
    key_heads: int,
    dtype: torch.dtype,
    device: str,
    as_it_lies: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """A block beside another one: the backward gets what attention over both gives."""
    make = partial(_random, dtype=dtype, device=device)
    query = make(BATCH, HEADS, form.queries, dims[0], seed=1)
    key, other_key = (make(BATCH, key_heads, n, dims[0], seed=2) for n in (form.keys, MORE))
    value, other_value = (make(BATCH, key_heads, n, dims[1], seed=3) for n in (form.keys, MORE))
    grad = make(BATCH, HEADS, form.queries, dims[1], seed=4)
    bias = None if form.bias is None else form.bias(form.queries, form.keys, device)
    if bias is not None and dtype.itemsize == 2:
        bias = bias.to(dtype)  # the CUDA kernels read it in the dtype of queries
    if bias is not None:
        bias = bias.to(compute_dtype(dtype))

    exact = [x.double() for x in (query, key, value)]
    exact_bias = None if bias is None else bias.double()
    block = OPEN.forward(*exact, exact_bias, form.causal, SCALE, **form.extra)
    others = (other_key.double(), other_value.double())
    other = OPEN.forward(exact[0], *others, None, False, SCALE, **_without_window(form))
    whole, lse = _joined(block, other)
    of_block = OPEN.backward(
        grad.double(), *exact, exact_bias, whole.to(dtype).double(), lse, form.causal, SCALE, **form.extra
    )

    xs = [as_it_lies(x) for x in (query, key, value)]
    out, own_lse = kernel.forward(*xs, bias, form.causal, SCALE, **form.extra)
    over_all = as_it_lies(whole.to(dtype)), lse.to(own_lse.dtype)
    grads = kernel.backward(as_it_lies(grad), *xs, bias, *over_all, form.causal, SCALE, **form.extra)
    seen = block[1] > -math.inf
    if not bool(out.isfinite().all()):
        raise AssertionError("out is not finite")
    errors = {"out": relative_error(out * seen[..., None], block[0] * seen[..., None])}
    errors["lse"] = relative_error(own_lse[seen], block[1][seen])
    for name, found, expected in zip(("of query", "of key", "of value"), grads, of_block, strict=True):
        errors[name] = relative_error(found, expected)
    return errors


def _without_window(form: Form) -> dict[str, Any]:
    return {name: x for name, x in form.extra.items() if name != "sliding"}


def _joined(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) over the keys of both."""
    lse = torch.logaddexp(one[1], two[1])
    out = sum(x * (own - lse).exp()[..., None] for x, own in (one, two))
    return out, lse


QUERY_PIECES = ((0, 70), (70, 71), (90, 200), (200, 333))
KEY_PIECES = ((0, 70), (70, 90), (100, 260), (300, 433))


def _documents(kernel: Kernel, dtype: torch.dtype, device: str) -> dict[str, Any]:
    errors = Errors(BOUNDS[dtype])
    for dims, key_heads, causal in itertools.product(((64, 64), (128, 128)), KEY_HEADS, (False, True)):
        case = f"heads of {dims[0]}, {HEADS} of {key_heads}{', causal' if causal else ''}"
        errors.add(case, partial(_compare_documents, kernel, dims, key_heads, causal, dtype, device))
    return errors.figures()


def _compare_documents(
    kernel: Kernel, dims: tuple[int, int], key_heads: int, causal: bool, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Each piece alone is the definition. Rows are numbered through the batch."""
    make = partial(_random, dtype=dtype, device=device)
    sizes = 200, 250
    query, grad = (make(BATCH, HEADS, sizes[0], dim, seed=i) for i, dim in enumerate(dims))
    key, value = (make(BATCH, key_heads, sizes[1], dim, seed=i + 2) for i, dim in enumerate(dims))
    out, lse = kernel.varlen.forward(query, key, value, QUERY_PIECES, KEY_PIECES, causal, SCALE)
    flat = [x.double().transpose(1, 2).flatten(0, 1) for x in (grad, query, key, value)]
    expected: list[list[Tensor]] = [[], [], [], [], []]
    whole = torch.zeros(BATCH * sizes[0], HEADS, dims[1], device=device, dtype=torch.float64)
    whole_lse = torch.zeros(BATCH * sizes[0], HEADS, device=device, dtype=torch.float64)
    for queries, keys in zip(QUERY_PIECES, KEY_PIECES, strict=True):
        places = (queries, queries, keys, keys)
        g, *xs = (x[slice(*at)].transpose(0, 1)[None] for x, at in zip(flat, places, strict=True))
        found = OPEN.forward(*xs, None, causal, SCALE)
        rounded = found[0].to(dtype).double()
        grads = OPEN.backward(g, *xs, None, rounded, found[1], causal, SCALE)
        whole[slice(*queries)], whole_lse[slice(*queries)] = rounded[0].transpose(0, 1), found[1][0].T
        for into, x in zip(expected, (found[0], *grads), strict=False):
            into.append(x[0].transpose(0, 1))
        expected[4].append(found[1][0])
    as_given = whole.unflatten(0, (BATCH, -1)).transpose(1, 2).to(dtype)
    lse_as_given = whole_lse.unflatten(0, (BATCH, -1)).transpose(1, 2).float()
    grads = kernel.varlen.backward(
        grad, query, key, value, as_given, lse_as_given, QUERY_PIECES, KEY_PIECES, causal, SCALE
    )
    names = ("out", "of query", "of key", "of value")
    errors = {
        name: relative_error(x, torch.cat(parts))
        for name, x, parts in zip(names, (out, *grads), expected, strict=False)
    }
    return errors | {"lse": relative_error(lse, torch.cat(expected[4], 1))}
