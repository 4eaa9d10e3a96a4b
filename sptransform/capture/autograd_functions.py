"""Custom autograd.Functions: what Dynamo makes of one becomes one op of ours, with both graphs as its body.

Dynamo's graph has ``%apply = autograd_function_apply(%forward, %backward, %x, %w)``, and both graphs in Torch IR. Each
is traced for itself, as the ops that it runs; here::

    %apply = sptransform.autograd_function('Scale', [%x, %w], 'operands(%0, %1); ..')

A gradient is what autograd makes of the function's: of its operand's dtype and shape, and none for an operand that
needs none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from sptransform.capture.flat import flat_graph
from sptransform.capture.saved_values import storages
from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.graph import dataflow
from sptransform.graph.body_graphs import BodyGraph
from sptransform.ops.body import is_constant
from sptransform.sharding.sizes import number, size_of

aten = torch.ops.aten

# in the meta of Dynamo's node: the name of the function's class, and which argument each operand is
NAME = "sptransform_function"
ORDER = "sptransform_order"

# a view that is legal on the captured strides may be illegal on those that a rank has
_IN_ANY_ORDER = dict.fromkeys((aten.view.default, aten._unsafe_view.default), aten.reshape.default)
_BY_STRIDE = frozenset({aten.as_strided.default, aten.as_strided_scatter.default})


def name_of_class(function: type) -> str:
    """What a custom autograd.Function is called, in graphs and in rules of users."""
    return f"{function.__module__}.{function.__qualname__}"


def applied(call: fx.Node, args: Sequence[Any], options: Mapping[str, Any]) -> list[Tensor | None]:
    """What the function returns where ``call`` calls it; None for what is left out, since nothing reads it.

    Raises:
        CaptureError: it writes into its operands, or is not made of ops of tensors.
        SymbolicSizeError: a length is open.
    """
    forward, backward, *given = args
    if options.get("dirty_idx"):
        raise _refused(call, "it writes into its inputs (mark_dirty)", "return new tensors")
    sizes = {i: number(size_of(x)) for i, x in enumerate(given) if isinstance(x, int | torch.SymInt)}
    order = [i for i in call.meta.get(ORDER, range(len(given))) if i not in sizes]
    operands = [given[i] for i in order]
    body, constants = _Joined(call, forward, backward, order, sizes).over(operands)
    # what gets no gradient from the function has none, on one device; a move of it would make zeros of that
    pairs = zip(operands, body.gradients, strict=False)
    operands = [x.detach() if grad is None and x.requires_grad else x for x, grad in pairs]
    found = torch.ops.sptransform.autograd_function(
        call.meta.get(NAME, "autograd.Function"),
        operands,
        constants,
        str(body.body),
        [i for i in options.get("non_differentiable_idx", ()) if i < len(body.results)],
    )
    num_taken = max((user.args[1] + 1 for user in call.users if user.target is operator.getitem), default=0)
    return [*found, *[None] * (num_taken - len(found))]


class _Joined:
    """The graph of one function, forward and backward.

    Args:
        order: which of Dynamo's operands are tensors, in the order in which the user passes them.
        sizes: the others, which are numbers.
    """

    def __init__(
        self,
        call: fx.Node,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        order: Sequence[int],
        sizes: Mapping[int, int],
    ) -> None:
        self._call, self._forward, self._backward, self._order, self._sizes = call, forward, backward, order, sizes
        self._graph = fx.Graph()
        self._constants: dict[fx.Node, Tensor] = {}

    def over(self, operands: Sequence[Tensor]) -> tuple[BodyGraph, list[Tensor]]:
        """The body over ``operands``, and the constants that it takes as further ones."""

        def results_of(*xs: Tensor) -> Any:
            by_place = {**self._sizes, **dict(zip(self._order, xs, strict=True))}
            return fx.Interpreter(self._forward).run(*(by_place[i] for i in range(len(by_place))))

        forward = _traced(results_of, operands)
        returned, saved = forward.graph.output_node().args[0]
        if not all(isinstance(x, fx.Node) for x in returned):
            raise _refused(self._call, "it returns something other than tensors", "return tensors only")
        results = [dataflow.value(x) for x in returned]
        at = [i for i, x in enumerate(saved) if isinstance(x, fx.Node)]

        def gradients(*xs: Tensor) -> list[Tensor | None]:
            kept = list(saved)  # what is no tensor is a constant of the backward
            for i, x in zip(at, xs[len(results) :], strict=True):
                kept[i] = x
            found = fx.Interpreter(self._backward).run(*xs[: len(results)], *kept)
            return [_as_autograd_takes(found[i], to) for i, to in zip(self._order, operands, strict=True)]

        with torch.autocast(operands[0].device.type, enabled=False):
            backward = _traced(gradients, [*results, *(dataflow.value(saved[i]) for i in at)])
        entered = [self._graph.placeholder(f"operand{i}") for i in range(len(operands))]
        (*outs,), kept = self._copy(forward, entered)
        given = [self._graph.placeholder(f"given{i}") for i in range(len(results))]
        grads = self._copy(backward, [*given, *(kept[i] for i in at)])
        # Dynamo returns what the forward saves too, in torch 2.11
        while len(outs) > 1 and not given[-1].users and not self._is_read(len(outs) - 1):
            outs.pop()
            self._graph.erase_node(given.pop())
        constants = tuple(self._constants)
        body = BodyGraph(
            self._graph,
            operands=(*entered, *constants),
            results=tuple(outs),
            given=tuple(given),
            gradients=(*grads, *(None for _ in constants)),
        )
        return body.close(), list(self._constants.values())

    def _is_read(self, result: int) -> bool:
        """Whether something reads this result of the call."""
        return any(
            user.target is not operator.getitem or (user.args[1] == result and user.users) for user in self._call.users
        )

    def _copy(self, traced: fx.GraphModule, inputs: Sequence[fx.Node]) -> Any:
        """Copy what was traced over ``inputs``; returns what it returns."""
        placeholders = traced.graph.find_nodes(op="placeholder")
        copies: dict[fx.Node, fx.Node] = dict(zip(placeholders, inputs, strict=True))
        keeps_writes = any(dataflow.writes(node) and node.target.namespace != "aten" for node in traced.graph.nodes)
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                with self._graph.inserting_before():
                    copies[node] = self._graph.placeholder(f"constant{len(self._constants)}")
                self._constants[copies[node]] = getattr(traced, node.target)
            elif node.op == "call_function":
                self._check(node)
                if dataflow.writes(node):
                    self._check_write(node, placeholders, copies)
                    if not keeps_writes:
                        continue
                if node.target is aten.copy.default and not keeps_writes:
                    copies[node] = self._copied(node, copies)
                    continue
                copies[node] = self._graph.node_copy(node, copies.__getitem__)
                if not keeps_writes:
                    copies[node].target = _IN_ANY_ORDER.get(node.target, node.target)
        return fx.map_arg(traced.graph.output_node().args[0], copies.__getitem__)

    def _copied(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """What a write of the second operand into the first leaves there."""
        old, new = (dataflow.value(x) for x in node.args[:2])
        found = copies[node.args[1]]
        if new.dtype != old.dtype:
            found = self._graph.call_function(aten.to.dtype, (found, old.dtype))
        if new.shape != old.shape:
            found = self._graph.call_function(aten.expand.default, (found, list(old.shape)))
        return found

    def _check_write(self, node: fx.Node, inputs: Sequence[fx.Node], copies: Mapping[fx.Node, fx.Node]) -> None:
        """Writes into what is the function's own, or what only its backward is given, are seen by nobody."""
        foreign = {x for x in inputs if copies[x].name.startswith(("operand", "constant"))}
        if node.target.namespace != "aten":
            foreign = set(inputs)
        written = set().union(*(storages(x) for x in dataflow.written_by(node)))
        if any(not written.isdisjoint(storages(x)) for x in foreign):
            raise _refused(self._call, f"{node.target} writes into an input of it", "write into new tensors")

    def _check(self, node: fx.Node) -> None:
        is_op = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        written = fx.map_arg((node.args, node.kwargs), lambda x: None)
        if not is_op or node.target in _BY_STRIDE or not is_constant([*written[0], *written[1].values()]):
            raise _refused(self._call, f"it calls {node.target}", "ops of torch.ops, as torch.library makes them")


def _traced(call: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The ops that ``call`` runs; writes are taken out, but those of ops that torch cannot take them out of."""
    traced = flat_graph(call, inputs)
    writes = [node.target for node in traced.graph.nodes if dataflow.writes(node)]
    if not writes or any(op.namespace != "aten" for op in writes):
        return traced
    return flat_graph(functionalize(call, remove="mutations"), inputs)


def _as_autograd_takes(grad: Tensor | None, operand: Tensor) -> Tensor | None:
    if grad is None or not operand.requires_grad:
        return None
    return (grad if grad.shape == operand.shape else grad.sum_to_size(operand.shape)).to(operand.dtype)


def _refused(call: fx.Node, found: str, fix: str) -> CaptureError:
    what = "this custom autograd.Function cannot be run as it is"
    return CaptureError(describe(what, node=call, found=f"{call.meta.get(NAME, 'a function')}: {found}", fix=fix))
