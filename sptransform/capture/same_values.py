"""Nodes that compute the same from the same: value numbers."""

from __future__ import annotations

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.op_rules.mask_ops import RETYPED


class SameValues:
    """The first of the nodes that compute a value."""

    def __init__(self) -> None:
        self._first: dict[str, fx.Node] = {}
        self._ones: dict[fx.Node, fx.Node] = {}

    def first(self, node: fx.Node) -> fx.Node:
        """The first node that was asked about, or read by one, and computes the same as ``node``."""
        waiting = [node]  # no recursion: a node may be computed from the state of many layers
        while waiting:
            at = waiting[-1]
            unknown = [x for x in at.all_input_nodes if x not in self._ones]
            waiting += unknown
            if not unknown:
                self._ones[waiting.pop()] = self._by_inputs(at)
        return self._ones[node]

    def _by_inputs(self, node: fx.Node) -> fx.Node:
        """The same, if it is known of the node's inputs. An op that may compute something else each time is the one."""
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or not dataflow.is_tensor(node) or is_random:
            return node
        value, same = dataflow.value(node), dataflow.value(node.args[0]) if node.target in RETYPED else None
        if same is not None and (same.dtype, same.device) == (value.dtype, value.device):
            return self._ones[node.args[0]]
        arguments = fx.map_arg((node.args, dict(node.kwargs)), self._ones.__getitem__)
        return self._first.setdefault(f"{node.target}{arguments}:{value.dtype}", node)
