"""Replaces in-place ops of a captured graph by out-of-place ops.

This works on the graph, after tracing: torch's own functionalization runs below autocast and would lose its regions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import compute_value

aten = torch.ops.aten


# view op -> the op that writes a new value of the view back into its base
_SCATTERS = {
    aten.diagonal.default: aten.diagonal_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}

# view ops that keep the row-major order of the base's entries
_RESHAPES = frozenset(
    {
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten.view_as.default,
    }
)


def functionalize(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place; a write into an input (a buffer) becomes one ``copy_`` at the end.

    Raises:
        CaptureError: an op writes through a view that cannot be written back, naming op and user line.
    """
    if any(dataflow.writes(node) for node in graph.nodes):
        _Functionalizer(graph).run()


class _Functionalizer:
    """Walks the graph once; ``current[n]`` is the node that holds the current value of n."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.current: dict[fx.Node, fx.Node] = {}
        self.base: dict[fx.Node, fx.Node] = {}  # view -> the node it is a view of
        self.version: dict[fx.Node, int] = {}  # root -> number of writes so far
        self.seen: dict[fx.Node, int] = {}  # view -> the version of its root that it reflects

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                self._write_back_inputs(node)
            written = node.args[0] if dataflow.writes(node) else None
            self._note_alias(node)
            node.args = fx.map_arg(node.args, lambda x, at=node: self._read(x, at))
            node.kwargs = fx.map_arg(node.kwargs, lambda x, at=node: self._read(x, at))
            if written is not None:
                self._write(node, written)

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.base:
            node = self.base[node]
        return node

    def _note_alias(self, node: fx.Node) -> None:
        storages = _storages(node)
        if node.op != "call_function" or not storages:
            return
        for source in node.all_input_nodes:
            if storages & _storages(source):
                self.base[node] = source
                self.seen[node] = self.version.get(self._root(source), 0)
                return

    def _read(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """The node with the current value of ``node``; a view is recomputed if its base was written."""
        if node in self.base:
            root = self._root(node)
            if self.seen.get(node, 0) != self.version.get(root, 0):
                source = self._read(self.base[node], at)
                with self.graph.inserting_before(at):
                    fresh = self.graph.node_copy(node, lambda x: source if x is node.all_input_nodes[0] else x)
                notes.fork(node, fresh)
                notes.note(fresh).differentiable |= notes.note(source).differentiable
                self.current[node] = fresh
                self.seen[node] = self.version[root]
        return self.current.get(node, node)

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        self._set(target, self._functional(node), node)
        node.replace_all_uses_with(target)
        self.graph.erase_node(node)

    def _functional(self, node: fx.Node) -> fx.Node:
        """A new node with the value of the written tensor after ``node``."""
        form = _functional_form(node)
        written = dataflow.value(node.args[0])
        if form is aten.copy.default:  # aten.copy has no derivative
            source = self._emit(node, aten.to.dtype, node.args[1], written.dtype)
            return self._emit(node, aten.expand.default, source, list(written.shape))
        new = self._emit(node, form, *node.args, **node.kwargs)
        # an out-of-place op promotes dtypes; an in-place write converts to the dtype of its target
        is_same = dataflow.value(new).dtype == written.dtype
        return new if is_same else self._emit(node, aten.to.dtype, new, written.dtype)

    def _emit(self, at: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before ``at`` that inherits its notes, with a fake value."""
        with self.graph.inserting_before(at):
            node = self.graph.call_function(target, args, kwargs)
        notes.fork(at, node)
        with dataflow.values(at)[0].fake_mode, torch.no_grad():
            compute_value(node)
        notes.derive_differentiable(node)
        return node

    def _set(self, target: fx.Node, new: fx.Node, at: fx.Node) -> None:
        """Make ``new`` the current value of ``target``, and write it into every base that ``target`` is a view of."""
        root = self._root(target)
        self.version[root] = self.version.get(root, 0) + 1
        while target is not root:
            self.current[target], self.seen[target] = new, self.version[root]
            base = self.base[target]
            new = self._whole(target, base, new, at)
            target = base
        self.current[root] = new

    def _whole(self, view: fx.Node, base: fx.Node, new: fx.Node, at: fx.Node) -> fx.Node:
        """``base`` after ``new`` is written to its ``view``. Raises CaptureError for unsupported kinds of views."""
        shape = list(dataflow.shape(base))
        if view.target in _SCATTERS:
            return self._emit(at, _SCATTERS[view.target], self._read(base, at), new, *view.args[1:], **view.kwargs)
        if view.target in _RESHAPES:
            return self._emit(at, aten.reshape.default, new, shape)
        if view.target is aten.transpose.int:
            return self._emit(at, aten.transpose.int, new, *view.args[1:])
        if view.target is aten.t.default:
            return self._emit(at, aten.t.default, new)
        if view.target is aten.permute.default:
            order = [dim % len(shape) for dim in view.args[1]]
            return self._emit(at, aten.permute.default, new, [order.index(dim) for dim in range(len(shape))])
        if _is_same(view, base):
            return self._emit(at, aten.alias.default, new)
        raise CaptureError(
            describe(
                "an op writes into a view, and this view cannot be written back out of place",
                node=at,
                found=f"a view made by {view.target}",
                fix="write out of place there, or into the tensor itself",
            )
        )

    def _write_back_inputs(self, output: fx.Node) -> None:
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and self.version.get(n)]:
            with self.graph.inserting_before(output):
                copy = self.graph.call_function(aten.copy_.default, (node, self.current[node]))
            copy.meta["val"] = dataflow.value(node)


def _storages(node: fx.Node) -> set[int]:
    return {value.untyped_storage()._cdata for value in dataflow.values(node)}


def _is_same(view: fx.Node, base: fx.Node) -> bool:
    """Whether a view is its base unchanged, gradient included: a no-op, as ``x.contiguous()`` often is."""
    if not dataflow.is_tensor(view) or not dataflow.is_tensor(base):
        return False
    if notes.note(base).differentiable and not notes.note(view).differentiable:
        return False  # detached: the written value has no gradient, but the base keeps its own
    x, y = dataflow.value(view), dataflow.value(base)
    return (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())


def _functional_form(node: fx.Node) -> Any:
    """The overload without the trailing underscore. Raises CaptureError if there is none."""
    schema = node.target._schema
    writes = [position for position, argument in enumerate(schema.arguments) if argument.is_write]
    name = schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(packet, node.target._overloadname, None) if packet is not None else None
    if overload is None or writes != [0] or not isinstance(node.args[0], fx.Node):
        raise CaptureError(
            describe("an op writes in place and has no out-of-place form", node=node, fix="write out of place there")
        )
    return overload
