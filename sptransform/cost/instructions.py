"""The training graphs as a flat list of what runs, with the memory that each op reads, makes and no longer needs.

An op that communicates in steps, such as a ring, is replaced by its steps, traced from the code that runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sptransform.cost.groups import Groups
from sptransform.cost.op_costs import (
    ALIASES,
    ATTENTION,
    HOPS,
    PICKS,
    UNFUSED,
    UPDATES,
    attention_sizes,
    flops_of,
    group_name,
    matmul_sizes,
    num_bytes,
    sent_by,
)
from sptransform.cost.records import Message
from sptransform.cost.scratch import scratch_of
from sptransform.diagnostics import provenance
from sptransform.graph import dataflow
from sptransform.ops.communication.steps import COMMUNICATING, group_of
from sptransform.ops.ring.trace_steps import trace_steps


@dataclass(eq=False)
class Buffer:
    """A piece of memory that tensors share. ``stays``: it is not freed, as an input, a parameter or an output is."""

    size: int
    stays: bool = False
    message: Message | None = None  # on its way here


@dataclass
class Instruction:
    """One op that does something; views do not. Attributes are those of :class:`Work`, and:

    Attributes:
        reads: what it reads -> how many bytes of it.
        makes: the new memory of its results.
        writes: bytes that it writes.
        scratch: bytes that its kernel holds beside ``reads`` and ``makes``.
        is_fusable: whether a compiler may put it into one kernel with others around it.
    """

    name: str
    op: str
    kind: str
    direction: str
    layer: str
    source_line: str | None
    dtype: str
    reads: dict[Buffer, int]
    makes: list[Buffer]
    writes: int
    flops: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    message: Message | None = None
    ring: tuple[str, int] | None = None
    scratch: int = 0
    is_fusable: bool = False


class Reader:
    """Reads graphs of one rank into instructions; knows which memory each node's tensors are in."""

    def __init__(self, rank: int, groups: Groups) -> None:
        self.rank, self.groups = rank, groups
        self._traces: dict[Any, fx.GraphModule] = {}
        self._scratch: dict[Any, int] = {}

    def read(self, graph: fx.Graph, env: dict[fx.Node, Any], direction: str) -> Iterator[Instruction]:
        """The instructions of ``graph``. ``env``: its placeholders -> their memory; filled with that of all nodes."""
        layer = ""
        for node in graph.nodes:
            if node.op == "get_attr":
                env[node] = Buffer(0, stays=True)
            elif node.op == "call_function":
                path = provenance.module_path(node)
                # a sum of gradients is of no module: it belongs to what came before
                layer = path if path or not node.meta.get("is_gradient_acc") else layer
                yield from self._node(node, env, direction, layer)

    def _node(self, node: fx.Node, env: dict[fx.Node, Any], direction: str, layer: str) -> Iterator[Instruction]:
        picked = dataflow.projection(node)
        if picked is not None:
            env[node] = env[picked[0]][picked[1]]
            return
        if not dataflow.handles_tensors(node):
            env[node] = None
            return
        packet = node.target.overloadpacket
        name = node.target._schema.name.partition("::")[2]
        if name in COMMUNICATING and packet is getattr(torch.ops.sptransform, name, None):
            yield from self._steps(node, name, env, direction, layer)
            return
        aliased = _aliased(node, packet)
        if aliased is not None and packet is not torch.ops._c10d_functional.wait_tensor:
            env[node] = pytree.tree_map(lambda _: env[aliased], dataflow.value(node))
            return
        yield self._instruction(node, packet, env, direction, layer, aliased)

    def _instruction(
        self, node: fx.Node, packet: Any, env: dict[fx.Node, Any], direction: str, layer: str, aliased: fx.Node | None
    ) -> Instruction:
        operands = dataflow.operands(node)
        updated = [operands[i] for i in UPDATES.get(packet, ())]
        if aliased is not None:
            env[node] = pytree.tree_map(lambda _: env[aliased], dataflow.value(node))
        elif updated:
            reused = iter(env[x] for x in updated)
            env[node] = pytree.tree_map(lambda _: next(reused), dataflow.value(node))
        else:
            env[node] = pytree.tree_map(_new, dataflow.value(node))
        makes = [] if aliased is not None or updated else _buffers(env[node])
        results = sum(map(num_bytes, dataflow.values(node)))
        reads: dict[Buffer, int] = {}
        for x in operands:
            size = min(num_bytes(dataflow.value(x)), env[x].size or results)
            reads[env[x]] = max(reads.get(env[x], 0), size)
        if packet in PICKS:
            reads[env[operands[0]]] = min(reads[env[operands[0]]], results)
        writes = sum(buffer.size for buffer in makes)
        if updated:
            touched = sum(dataflow.value(x).numel() for x in operands if x not in updated)
            for x in updated:
                value = dataflow.value(x)
                reads[env[x]] = min(num_bytes(value), touched * value.element_size())
                writes += reads[env[x]]
        found = Instruction(
            node.name,
            str(node.target).removesuffix(".default"),
            "memory",
            direction,
            layer,
            provenance.source_line(node),
            str(dataflow.value(operands[0]).dtype if operands else "").removeprefix("torch."),
            reads,
            makes,
            writes,
        )
        self._classify(found, node, packet, env, aliased)
        return found

    def _classify(
        self, found: Instruction, node: fx.Node, packet: Any, env: dict[fx.Node, Any], aliased: fx.Node | None
    ) -> None:
        """What kind of work it is, and what a kernel of that kind wants to know."""
        if packet is torch.ops._c10d_functional.wait_tensor:
            found.kind, found.message = "wait", env[aliased].message
            found.reads, found.writes = {env[aliased]: 0}, 0
            return
        ranks = self.groups.get(group_name(node)) if node.args and isinstance(node.args[-1], str) else None
        sent = sent_by(node, len(ranks), ranks.index(self.rank)) if ranks else None
        if sent is not None:
            found.kind, found.message = "message", Message(*sent, ranks)
            for buffer in found.makes:
                buffer.message = found.message
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), dataflow.value)
        found.flops = flops_of(node, args, kwargs)
        key = _call(packet, args, kwargs)
        if key not in self._scratch:
            self._scratch[key] = scratch_of(packet, args, kwargs)
        found.scratch = self._scratch[key]
        if packet in ATTENTION:
            found.kind, found.sizes = "attention", attention_sizes(node, args, kwargs)
        elif found.flops:
            found.kind, found.sizes = "matmul", matmul_sizes(args)
        else:
            found.is_fusable = node.target.namespace == "aten" and packet not in UNFUSED

    def _steps(
        self, node: fx.Node, name: str, env: dict[fx.Node, Any], direction: str, layer: str
    ) -> Iterator[Instruction]:
        """What an op that communicates in steps does: its own ops, in the memory of the graph around it."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), dataflow.value)
        key = _call(name, args, kwargs)
        if key not in self._traces:
            ranks = self.groups.get(group_of(name, args, kwargs))
            self._traces[key] = trace_steps(name, ranks.index(self.rank) if ranks else 0, args, kwargs)
        inner = self._traces[key].graph
        given = [x for x in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(x, fx.Node)]
        own = dict(zip(inner.find_nodes(op="placeholder"), (env[x] for x in given), strict=True))
        (output,) = inner.find_nodes(op="output")
        waits = 0
        for found in self.read(inner, own, direction):
            found.layer, found.source_line = layer, provenance.source_line(node)
            found.ring = node.name, waits
            found.name = f"{node.name}.{found.name}"
            found.is_fusable = False
            if found.kind == "message" and node.target.overloadpacket in HOPS:
                found.message = replace(found.message, kind="send_recv")
                for buffer in found.makes:
                    buffer.message = found.message
            waits += found.kind == "wait"
            yield found
        env[node] = pytree.tree_map(lambda x: own[x] if isinstance(x, fx.Node) else None, output.args[0])


def _call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What two calls of equal cost have in common."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    # an op may do otherwise with 1.0 than with 1, which Python takes for equal
    what = ((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
    return op, spec, tuple(what)


def _aliased(node: fx.Node, packet: Any) -> fx.Node | None:
    """The operand in whose memory all results are; None if the op makes new memory."""
    returns = node.target._schema.returns
    if packet not in ALIASES and not (returns and all(x.alias_info is not None for x in returns)):
        return None
    return next(iter(dataflow.operands(node)), None)


def _new(value: Any) -> Buffer | None:
    return Buffer(num_bytes(value)) if isinstance(value, Tensor) else None


def _buffers(found: Any) -> list[Buffer]:
    return [x for x in pytree.tree_leaves(found) if isinstance(x, Buffer)]


def saved(backward: fx.Graph, forward: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """The memory of the backward's placeholders: what the forward saved, by name, and new memory for gradients."""
    return {
        node: forward[node.name] if node.name in forward else _new(dataflow.value(node))
        for node in backward.find_nodes(op="placeholder")
    }


def gradients_of_outputs(backward: fx.Graph, env: Mapping[fx.Node, Any]) -> Iterator[Instruction]:
    """What autograd does before the backward: each output has a gradient, zeros where no loss depends on it."""
    for node in backward.find_nodes(op="placeholder"):
        made = env[node]
        if node.name.startswith("tangents_") and made is not None:  # states of generators are given as well
            dtype = str(dataflow.value(node).dtype).removeprefix("torch.")
            yield Instruction(node.name, "aten.zeros", "memory", "backward", "", None, dtype, {}, [made], made.size)
