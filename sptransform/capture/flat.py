"""Part of Dynamo's graph as the ATen ops that it runs, below autograd, autocast and the levels of functorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from sptransform.sharding.sizes import number, size_of


def flat_graph(call: Callable[..., Any], inputs: Sequence[Tensor], grad_enabled: bool = False) -> fx.GraphModule:
    """The ops that ``call`` runs on tensors such as the fakes ``inputs``; it may be traced while another trace runs.

    An inner ``grad`` needs grad mode to be enabled; the inputs have no gradient.

    Raises:
        SymbolicSizeError: a length is open.
    """
    layouts = [([number(size_of(n)) for n in x.shape], [number(size_of(n)) for n in x.stride()]) for x in inputs]
    # Private: a trace above autograd records grad modes and autocast instead of running them, by a torch function
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction(), torch.set_grad_enabled(grad_enabled):
        pairs = zip(layouts, inputs, strict=True)
        fakes = [torch.empty_strided(*layout, dtype=x.dtype, device=x.device) for layout, x in pairs]
        return make_fx(call, _allow_non_fake_inputs=True)(*fakes)
