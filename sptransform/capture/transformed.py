"""Parts of Dynamo's graph between entering and leaving a functorch transform: run as the ops that they come to.

Dynamo writes ``torch.vmap`` and its kin as ops that enter a level, batch tensors at it, and leave it, with plain ops
between. A trace above autograd does not look through levels; one below does. So such a part is traced for itself, and
runs as what that gives::

    _vmap_increment_nesting(8, 'error');  %i = _add_batch_dim(%x, 0, 1);  %y = mul(%i, %w);
    %out = _remove_batch_dim(%y, 1, 8, 0);  _vmap_decrement_nesting()

becomes ``%out = aten.mul(%x, aten.unsqueeze(%w, 0))``. Autograd then works on these ops. Those of an inner ``grad`` or
``jvp`` may be detached from what they are computed from: it is refused where gradients pass, and so is a ``no_grad``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.predispatch
from torch import Tensor, fx

from sptransform.capture.flat import flat_graph
from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.sharding.sizes import number, size_of

LOADING = torch._functorch.predispatch.lazy_load_decompositions  # stands before a vmap
_LEVELS = ("grad", "jvp", "vmap")


def _steps(step: str) -> dict[Any, str]:
    """The ops that enter, or leave, a level -> its kind."""
    homes = (torch._C._functorch, torch._functorch.predispatch)
    names = {f"_{kind}_{step}_nesting": kind for kind in _LEVELS}
    return {vars(home)[name]: kind for home in homes for name, kind in names.items() if name in vars(home)}


_ENTERING, _LEAVING = _steps("increment"), _steps("decrement")


@dataclass(frozen=True)
class Transformed:
    """The nodes from the one that enters the outermost level to the one that leaves it."""

    nodes: tuple[fx.Node, ...]

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads of nodes before it."""
        read = [x for node in self.nodes for x in node.all_input_nodes]
        return list(dict.fromkeys(x for x in read if x not in set(self.nodes)))

    @property
    def outputs(self) -> list[fx.Node]:
        """Its nodes that are read behind it."""
        own = set(self.nodes)
        return [node for node in self.nodes if any(user not in own for user in node.users)]

    def run(self, gm: fx.GraphModule, values: Sequence[Any]) -> list[Tensor]:
        """Its outputs, computed by ops without levels from the values of its inputs.

        Raises:
            CaptureError: it holds what such ops cannot say.
            SymbolicSizeError: a length is open.
        """
        self._check(values)
        graph = fx.Graph()
        # what is no tensor is a constant of these ops
        copies: dict[fx.Node, Any] = {
            x: number(size_of(value)) if isinstance(value, torch.SymInt) else value
            for x, value in zip(self.inputs, values, strict=True)
        }
        tensors = {x: value for x, value in copies.items() if isinstance(value, Tensor)}
        copies |= {x: graph.placeholder(x.name) for x in tensors}
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[x] for x in self.outputs])
        LOADING()
        run = fx.Interpreter(fx.GraphModule(gm, graph)).run
        flat = flat_graph(run, [*tensors.values()], grad_enabled=torch.is_grad_enabled())
        flat.graph.eliminate_dead_code()  # batching takes a look at single entries
        return fx.Interpreter(flat).run(*tensors.values())

    def _check(self, values: Sequence[Any]) -> None:
        has_gradients = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)
        for node in self.nodes:
            is_switch = node.target is torch._C._set_grad_enabled  # which the ops do not show
            is_nested = has_gradients and (is_switch or _ENTERING.get(node.target, "vmap") != "vmap")
            if is_nested or isinstance(node.target, torch._ops.HigherOrderOperator):
                raise CaptureError(
                    describe(
                        "the graph cannot show what a transform of functorch does here",
                        node=node,
                        found=f"{node.target}" + (", of tensors that need gradients" if is_nested else " inside of it"),
                        fix="x.detach() instead of torch.no_grad() inside of it"
                        if is_switch
                        else "write out the derivative, or call it under torch.no_grad()"
                        if is_nested
                        else "torch ops",
                    )
                )


def transformed(graph: fx.Graph) -> dict[fx.Node, Transformed]:
    """First node -> the part that begins there."""
    found: dict[fx.Node, Transformed] = {}
    depth, nodes = 0, []
    for node in graph.nodes:
        depth += node.target in _ENTERING
        if depth:
            nodes.append(node)
        if node.target in _LEAVING:
            depth -= 1
            if not depth:
                found[nodes[0]] = Transformed(tuple(nodes))
                nodes = []
    return found
