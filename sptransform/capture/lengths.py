"""Which sizes of Dynamo's graph stay symbolic."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from sptransform.sharding.sizes import split_length


def fix_sizes(gm: fx.GraphModule, num_ranks: int | None) -> None:
    """Decide for every symbolic size whether the graph serves multiples of ``num_ranks``, or all that are none.

    None fixes all sizes to their values, as where the ranks have to share one that is no multiple. The guards are
    Dynamo's: another size causes a recompile, never a wrong run.
    """
    for size, is_length in _symbolic(gm):
        if num_ranks is None:
            int(size)
        elif is_length:  # an int that is itself an input may stay symbolic
            split_length(size, num_ranks)


def has_symbolic_sizes(gm: fx.GraphModule) -> bool:
    """Whether Dynamo left any input size open."""
    return any(not size.node.expr.is_number for size, _ in _symbolic(gm))


def _symbolic(gm: fx.GraphModule) -> Iterator[tuple[torch.SymInt, bool]]:
    """Every symbolic int among the inputs, and whether it is a tensor's size."""
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            example = node.meta.get("example_value")
            is_tensor = isinstance(example, torch.Tensor)
            for size in example.shape if is_tensor else [example]:
                if isinstance(size, torch.SymInt):
                    yield size, is_tensor
