"""Ops of attention kernels that models call directly, and how to read a call of one as attention.

Ops are known by name, since the libraries that register them need not be installed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sptransform.graph.calls import arguments_of


@dataclass(frozen=True)
class Kernel:
    """What the arguments of an op are called; "" for what it does not have.

    Query, key and value are [batch, sequence, heads, width], or [tokens, heads, width] where there are ``documents``;
    the first result is of the query's layout. Masks are aligned at the last query and the last key.

    Attributes:
        window: how many earlier and how many later keys a query sees, negative for all: two arguments, or a list.
        documents: where documents end among queries and among keys, cumulated, a leading zero included.
        ignored: arguments that say how to compute, not what.
        gradient: the op that a custom autograd.Function around this one calls in its backward; "" where the op has its
            own derivative.
        in_gradient: what the gradient calls arguments that it has by another name.
    """

    query: str = "q"
    key: str = "k"
    value: str = "v"
    scale: str = "softmax_scale"
    causal: str = "causal"
    window: tuple[str, ...] = ("window_size_left", "window_size_right")
    softcap: str = "softcap"
    slopes: str = "alibi_slopes"
    dropout: str = "dropout_p"
    documents: tuple[str, ...] = ("cu_seqlens_q", "cu_seqlens_k")
    ignored: frozenset[str] = frozenset()
    gradient: str = ""
    in_gradient: Mapping[str, str] = field(default_factory=dict)

    @property
    def meaning(self) -> list[str]:
        """The arguments that say what is computed."""
        named = [self.query, self.key, self.value, self.scale, self.causal, *self.window]
        return [name for name in (*named, self.softcap, self.slopes, self.dropout, *self.documents) if name]


KERNELS: Mapping[str, Kernel] = {
    "flash_attn._flash_attn_forward": Kernel(
        documents=(), ignored=frozenset({"return_softmax"}), gradient="flash_attn._flash_attn_backward"
    ),
    "flash_attn._flash_attn_varlen_forward": Kernel(
        ignored=frozenset({"max_seqlen_q", "max_seqlen_k", "return_softmax", "zero_tensors", "num_splits"}),
        gradient="flash_attn._flash_attn_varlen_backward",
    ),
    "flash_attn_3._flash_attn_forward": Kernel(
        slopes="",
        dropout="",
        ignored=frozenset(
            {"max_seqlen_q", "max_seqlen_k", "rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa",
             "sm_margin"}
        ),
        gradient="flash_attn_3._flash_attn_backward",
        in_gradient={"causal": "is_causal"},
    ),
    "torch_attn._varlen_attn": Kernel(
        query="query",
        key="key",
        value="value",
        scale="scale",
        causal="is_causal",
        window=("window_size",),
        softcap="",
        slopes="",
        dropout="",
        documents=("cu_seq_q", "cu_seq_k"),
        ignored=frozenset({"max_q", "max_k", "enable_gqa", "num_splits"}),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel, read; nodes of the graph where it has tensors.

    Attributes:
        before, after: how many earlier and how many later keys a query sees; None for all.
        documents: the ends of documents among queries and among keys; None where there is one, or a batch.
        refused: arguments that change the result in a way attention does not know, by name.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float | None
    before: int | None
    after: int | None
    softcap: float
    slopes: fx.Node | None
    dropout_p: float
    documents: tuple[fx.Node, fx.Node] | None
    refused: Mapping[str, Any]


def kernel_of(target: Any) -> Kernel | None:
    """The kernel behind an op, an overload or all of them; None if it is none."""
    return KERNELS.get(op_name(target))


def op_name(target: Any) -> str:
    """The name of an op, as ``flash_attn._flash_attn_forward``; of anything else, a text that names no op."""
    return str(target).removesuffix(".default")


def read_call(node: fx.Node) -> KernelCall:
    """The call of a node whose target :func:`kernel_of` knows."""
    kernel = kernel_of(node.target)
    assert kernel is not None
    arguments, defaults = arguments_of(node)

    def take(name: str, otherwise: Any = None) -> Any:
        return arguments.pop(name) if name else otherwise

    query, key, value = (take(name) for name in (kernel.query, kernel.key, kernel.value))
    scale, slopes, dropout_p = take(kernel.scale), take(kernel.slopes), take(kernel.dropout, 0.0)
    softcap = max(take(kernel.softcap, 0.0), 0.0)
    window = [take(name) for name in kernel.window]
    before, after = window if len(window) == 2 else window[0] or (-1, -1)
    if take(kernel.causal):
        after = 0
    documents = [take(name) for name in kernel.documents]
    refused = {name: x for name, x in arguments.items() if name not in kernel.ignored and x != defaults[name]}
    if None in documents and documents != [None, None]:
        refused |= {name: x for name, x in zip(kernel.documents, documents, strict=True) if x is None}
    is_packed = None not in documents and bool(documents)
    return KernelCall(
        query,
        key,
        value,
        scale=scale,
        before=before if before >= 0 else None,
        after=after if after >= 0 else None,
        softcap=softcap,
        slopes=slopes,
        dropout_p=dropout_p,
        documents=tuple(documents) if is_packed else None,
        refused=refused,
    )


# Functions and methods that, around a kernel in a custom autograd.Function, only move, pad, count or allocate entries
AROUND_KERNELS = frozenset(
    {
        operator.getitem,
        torch.empty,
        torch.empty_like,
        torch.nn.functional.pad,
        torch._C._nn.pad,
        torch._C._set_grad_enabled,
        "contiguous",
        "detach",
        "size",
        "split",
        "unbind",
    }
)

# Of these, those that pad
PADDING = frozenset({torch.nn.functional.pad, torch._C._nn.pad})

# Of these, those that make a tensor that nothing was written to yet
ALLOCATING = frozenset({torch.empty, torch.empty_like})

# Of these, those that say something of gradients, of which there are none inside an autograd.Function
GRAD_MODE = frozenset({torch._C._set_grad_enabled})
DETACHING_METHODS = frozenset({"detach"})
