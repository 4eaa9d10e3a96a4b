"""Replaces in-place ops of a captured graph by out-of-place ops.

This works on the graph, after tracing: torch's own functionalization runs below autocast and would lose its regions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

# Private: the call that switches grad mode in a traced graph; torch has no public name for it.
from torch._C import _set_grad_enabled

from sptransform.capture.saved_values import keeper_of, storages
from sptransform.capture.written_views import is_view_op, scattered, why_not_by_number, written_by_number
from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import emit_like

aten = torch.ops.aten


def functionalize(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place; a write into an input (a buffer) becomes one ``copy_`` at the end.

    A write that autograd does not see, under ``no_grad`` or through ``detach``, changes the value of what is written
    and of all that shares its memory, but no gradient: ``sptransform.with_value``. What a detached tensor is written
    with is its own gradient, and that of no other tensor in its memory.

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
        self.own: dict[fx.Node, fx.Node] = {}  # detached view -> a node that has its gradient, if it has one

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                self._write_back_inputs(node)
            written = _written(node) if dataflow.writes(node) else None
            self._note_alias(node)
            node.args = fx.map_arg(node.args, lambda x, at=node: self._read(x, at))
            node.kwargs = fx.map_arg(node.kwargs, lambda x, at=node: self._read(x, at))
            if written is None:
                continue
            if torch.Tag.inplace_view in node.target.tags:
                self._view_in_place(node, written)
            else:
                self._write(node, written)

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        last = node.prev  # of what ran before
        self._set_as_seen(target, self._functional(node, target), node, last)
        node.replace_all_uses_with(target)
        self.graph.erase_node(node)

    def _set_as_seen(self, target: fx.Node, new: fx.Node, at: fx.Node, last: fx.Node) -> None:
        """Set ``target`` by an op ``at`` this place, with the gradients that autograd gives; ``last`` ran before it.

        It sees the write up to where the chain of views is detached, and none under ``no_grad``.
        """
        root, top = self._root(target), None
        if notes.region_of(at).grad_enabled:
            top = next(filter(_detaches, reversed(self._chain(target, root))), root)
        has_gradients = self._has_gradients(root)
        if top is not root and (has_gradients or top is not None):
            keeper = keeper_of(self.current.get(root, root), last)
            if keeper is not None:
                raise _kept(keeper, at)
        if top is root or not (notes.note(new).differentiable or has_gradients):
            self._set(target, new, at, root)
        elif top is None:
            self._set_hidden(target, new, at)
        else:
            self._set(target, new, at, top)
            value = self.current[top]
            self._set_hidden(top, self._detached(value, at), at)
            self.current[top], self.seen[top] = value, self.version[root]
            if notes.note(value).differentiable:
                self.own[top] = value

    def _has_gradients(self, root: fx.Node) -> bool:
        """Whether something that shares memory with ``root`` has a gradient."""
        is_owned = any(self._root(view) is root for view in self.own)
        return is_owned or bool(notes.note(self.current.get(root, root)).differentiable)

    def _set_hidden(self, target: fx.Node, new: fx.Node, at: fx.Node) -> None:
        """Set ``target``; all that shares its memory keeps the gradient that it has, or has none."""
        root = self._root(target)
        before = self.current.get(root, root)
        self._renew(root, self._detached(before, at))
        self._set(target, new, at, root)
        value = self._detached(self.current[root], at)
        self._renew(root, self._with_value(before, value, at) if notes.note(before).differentiable else value)

    def _with_value(self, x: fx.Node, value: fx.Node, at: fx.Node) -> fx.Node:
        with self._grad_mode(True, at):
            return emit_like(at, torch.ops.sptransform.with_value.default, x, value)

    def _detached(self, x: fx.Node, at: fx.Node) -> fx.Node:
        if not notes.note(x).differentiable:
            return x
        detached = self._emit(at, aten.detach.default, x)
        notes.note(detached).differentiable = False
        return detached

    @contextmanager
    def _grad_mode(self, enabled: bool, at: fx.Node) -> Iterator[None]:
        """What is inserted before ``at`` is in this grad mode."""
        around = notes.region_of(at).grad_enabled
        if around == enabled:
            yield
            return
        with self.graph.inserting_before(at):
            self.graph.call_function(_set_grad_enabled, (enabled,))
            yield
            self.graph.call_function(_set_grad_enabled, (around,))

    def _renew(self, root: fx.Node, new: fx.Node) -> None:
        """``new`` is the value of the root, of which every view is to be made anew."""
        self.current[root] = new
        self.version[root] = self.version.get(root, 0) + 1

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.base:
            node = self.base[node]
        return node

    def _base_of(self, view: fx.Node) -> fx.Node:
        """The tensor of which ``view`` is a view; a piece of a split tensor is one of that tensor."""
        base = self.base[view]
        return base if dataflow.projection(view) is None else self.base[base]

    def _chain(self, view: fx.Node, root: fx.Node) -> list[fx.Node]:
        """The ops that make ``view`` of ``root``, first one first."""
        chain = []
        while view is not root:
            chain.append(view)
            view = self.base[view]
        return chain[::-1]

    def _note_alias(self, node: fx.Node) -> None:
        own = storages(node)
        if node.op != "call_function" or not own:
            return
        picked = dataflow.projection(node)
        if picked is not None and picked[0] not in self.base:
            return  # an output of an op that makes new tensors
        for source in node.all_input_nodes:
            if own & storages(source):
                self.base[node] = source
                self.seen[node] = self.version.get(self._root(source), 0)
                return

    def _read(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """The node with the current value of ``node``; a view is recomputed if its base was written."""
        if node in self.base:
            root = self._root(node)
            if self.seen.get(node, 0) != self.version.get(root, 0):
                source = self._laid_out_for(node, self._read(self.base[node], at), at)
                is_differentiable = bool(notes.note(source).differentiable) and not _detaches(node)
                is_recorded = is_differentiable or notes.region_of(at).grad_enabled
                with self._grad_mode(is_recorded, at), self.graph.inserting_before(at):
                    fresh = self.graph.node_copy(node, lambda x: source if x is node.all_input_nodes[0] else x)
                notes.fork(node, fresh)
                notes.note(fresh).differentiable = is_differentiable
                if node in self.own:
                    fresh = self._with_value(self.own[node], fresh, at)
                self.current[node] = fresh
                self.seen[node] = self.version[root]
        return self.current.get(node, node)

    def _laid_out_for(self, view: fx.Node, source: fx.Node, at: fx.Node) -> fx.Node:
        """The new value of what ``view`` is a view of, in the memory layout that the view op counts in, if it does."""
        if view.target is not aten.as_strided.default:
            return source
        before = dataflow.value(self.base[view])
        if not _is_laid_out(source, before) and before.is_contiguous():
            source = self._emit(at, aten.clone.default, source, memory_format=torch.contiguous_format)
        if not _is_laid_out(source, before):
            raise _not_written_back(view, at)
        return source

    def _view_in_place(self, node: fx.Node, target: fx.Node) -> None:
        """``x.t_()`` writes nothing: from here on, x is a view of what it was."""
        form = _functional_form(node)
        if not is_view_op(form) or target.op == "placeholder":
            raise _no_form(node)
        view = self._emit(node, form, *node.args, **node.kwargs)
        self.base[view], self.seen[view] = target, self.version.get(self._root(target), 0)
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        target.replace_all_uses_with(view, delete_user_cb=lambda user: order[user] > order[node])
        node.replace_all_uses_with(view)
        self.graph.erase_node(node)

    def _functional(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """A new node with the value of the written tensor after ``node``."""
        form = _functional_form(node)
        written = dataflow.value(target)
        if form is aten.copy.default:  # aten.copy has no derivative
            source = self._emit(node, aten.to.dtype, node.args[1], written.dtype)
            return self._emit(node, aten.expand.default, source, list(dataflow.shape(target)))
        kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
        new = self._emit(node, form, *node.args, **kwargs)
        # an out-of-place op promotes dtypes; an in-place write converts to the dtype of its target
        is_same = dataflow.value(new).dtype == written.dtype
        return new if is_same else self._emit(node, aten.to.dtype, new, written.dtype)

    def _emit(self, at: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before ``at``, which has no gradient under ``no_grad``."""
        node = emit_like(at, target, *args, **kwargs)
        notes.note(node).differentiable &= notes.region_of(node).grad_enabled
        return node

    def _set(self, target: fx.Node, new: fx.Node, at: fx.Node, root: fx.Node) -> None:
        """Make ``new`` the current value of ``target``, and write it into every base up to ``root``."""
        views = [target] if target is not root else []
        while views and (base := self._base_of(views[-1])) is not root:
            views.append(base)
        memory = self._root(target)
        self._read(root, at)  # it may be a view itself
        self.version[memory] = self.seen[root] = version = self.version.get(memory, 0) + 1
        if views:
            self.current[target], self.seen[target] = new, version

        def emit(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return self._emit(at, op, *args, **kwargs)

        value: fx.Node | None = new
        for view in views:
            base = self._base_of(view)
            value = scattered(view, base, self._read(base, at), value, emit)
            if value is None:
                break
            if base is not root:
                self.current[base], self.seen[base] = value, version
        else:
            self.current[root] = value
            return
        chain = self._chain(target, root)
        if (view := why_not_by_number(chain, root)) is not None:
            raise _not_written_back(view, at)
        self.current[root] = written_by_number(chain, root, self.current.get(root, root), new, emit)
        # what was noted of views between them is void
        self.version[memory] = self.seen[root] = self.seen[target] = version + 1

    def _write_back_inputs(self, output: fx.Node) -> None:
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and self.version.get(n)]:
            if notes.note(node).stored:
                raise _into_a_part(node)
            # a leaf that has a gradient takes another value where autograd does not look
            is_recording = notes.region_of(output).grad_enabled and not notes.note(node).differentiable
            with self._grad_mode(is_recording, output), self.graph.inserting_before(output):
                copy = self.graph.call_function(aten.copy_.default, (node, self.current[node]))
            copy.meta["val"] = dataflow.value(node)
            notes.note(copy).differentiable = False
            if _has_gradients_after(node):
                self._keep(node, copy)

    def _keep(self, written: fx.Node, copy: fx.Node) -> None:
        """Let the backward have what an input held before ``copy`` writes it."""
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        kept = emit_like(first, torch.ops.sptransform.before_write.default, written)
        for user in list(written.users):
            # `with_value` reads nothing but the gradient; what is returned is what was written
            is_value = user.op != "output" and user.target is not torch.ops.sptransform.with_value.default
            if is_value and user not in (kept, copy):
                user.replace_input_with(written, kept)


def _has_gradients_after(node: fx.Node) -> bool:
    """Whether something is computed from the node that a backward goes through, and may read."""
    waiting, found = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if notes.note(user).differentiable and notes.region_of(user).grad_enabled and not dataflow.writes(user):
                return True
            if user not in found:
                found.add(user)
                waiting.append(user)
    return False


def _detaches(view: fx.Node) -> bool:
    """Whether autograd does not see what is written into the view."""
    return view.target is aten.detach.default or not notes.region_of(view).grad_enabled


def _is_laid_out(node: fx.Node, like: torch.Tensor) -> bool:
    """Whether the node's value lies in memory as ``like`` does."""
    value = dataflow.value(node)
    return (value.stride(), value.storage_offset()) == (like.stride(), like.storage_offset())


def _written(node: fx.Node) -> fx.Node:
    """The tensor that the node's op writes: its first argument, or ``out``. Raises CaptureError for other ops."""
    writes = [(i, x.name) for i, x in enumerate(node.target._schema.arguments) if x.is_write]
    found = None
    if len(writes) == 1:
        (position, name), *_ = writes
        found = node.args[0] if position == 0 and node.args else node.kwargs.get("out") if name == "out" else None
    if not isinstance(found, fx.Node):
        raise _no_form(node)
    return found


def _functional_form(node: fx.Node) -> Any:
    """The overload that returns what the node's op writes. Raises CaptureError if there is none."""
    schema = node.target._schema
    name = schema.name.split("::")[1]
    has_out = "out" in node.kwargs
    plain = re.sub(r"^__i(\w+__)$", r"__\1", name) if name.startswith("__") else name.removesuffix("_")
    packet = getattr(aten, plain, None) if has_out or plain != name else None
    overloads = [getattr(packet, each) for each in packet.overloads()] if packet is not None else []
    read = [x for x in schema.arguments if not (has_out and x.is_write)]
    forms = [x for x in overloads if _takes(x._schema.arguments, read)]
    if not forms:
        raise _no_form(node)
    return forms[0]


def _takes(arguments: Sequence[Any], read: Sequence[Any]) -> bool:
    """Whether an op with ``arguments`` can be called with ``read``. It may call what is written otherwise (dropout)."""
    if [str(x.type) for x in arguments] != [str(x.type) for x in read]:
        return False
    return all(x.name == y.name or y.is_write for x, y in zip(arguments, read, strict=True))


def _no_form(node: fx.Node) -> CaptureError:
    message = "an op writes in place and has no out-of-place form"
    return CaptureError(describe(message, node=node, fix="write out of place there"))


def _kept(keeper: fx.Node, at: fx.Node) -> CaptureError:
    return CaptureError(
        describe(
            "an op writes, where autograd does not see it, into a tensor that a backward reads",
            node=at,
            found=f"%{keeper.name}, whose backward would read what is written",
            fix="write before the tensor is read, or into a clone of it",
        )
    )


def _into_a_part(parameter: fx.Node) -> CaptureError:
    return CaptureError(
        describe(
            "the model writes into a parameter of which each rank keeps a part",
            node=parameter,
            fix="shard_parameters=False; or change the parameter before the forward",
        )
    )


def _not_written_back(view: fx.Node, at: fx.Node) -> CaptureError:
    return CaptureError(
        describe(
            "an op writes into a view, and this view cannot be written back out of place",
            node=at,
            found=f"a view made by {view.target}",
            fix="write out of place there, or into the tensor itself",
        )
    )
