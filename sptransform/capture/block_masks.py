"""Which nodes of Dynamo's graph compute nothing but the blocks of masks for flex_attention.

``create_block_mask`` in a forward evaluates the mask for all queries and keys, by functorch transforms and writes into
new tensors, which capture would refuse; and flex_attention without a mask makes blocks too. Nobody reads them here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
import torch._functorch.predispatch
from torch import fx

FLEX = torch.ops.higher_order.flex_attention
_BLOCKS = 4  # flex_attention's argument


def only_for_blocks(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose results only blocks are made of, and the writes and functorch transforms among them."""
    transforms = list(_transforms(graph))
    if not transforms:
        return set()
    blocks = [x for node in graph.nodes if node.target is FLEX for x in _blocks(node)]
    # those of a mask that no layer has end in a conversion that nothing reads
    blocks += [node for node in graph.nodes if node.target == "to" and not node.users]
    made = set(_behind(blocks))
    aside = {node for first, *_, last in transforms for node in (first, last)}
    aside |= {node for node in graph.nodes if node.target in _HELPERS and not node.users}
    made -= set(_behind([x for node in graph.nodes if node not in made | aside for x in _read_by(node)]))
    unread = set(made)
    for region in transforms:
        if all(node in made or node in aside for node in region):
            unread.update(region)
    return unread


# A vmap begins with these; one of an index that its function does not read has no users
_HELPERS = frozenset(
    {torch._functorch.predispatch.lazy_load_decompositions, torch._functorch.predispatch._add_batch_dim}
)


def _blocks(node: fx.Node) -> list[fx.Node]:
    return [x for x in node.args[_BLOCKS][:-1] if isinstance(x, fx.Node)]


def _read_by(node: fx.Node) -> list[fx.Node]:
    """What a node reads, blocks left out."""
    if node.target is not FLEX:
        return node.all_input_nodes
    found: list[fx.Node] = []
    fx.map_arg((node.args[:_BLOCKS], node.args[_BLOCKS][-1], node.args[_BLOCKS + 1 :]), found.append)
    return found


def _behind(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """The nodes, all that they are computed from and the writes into it, inputs left out."""
    done, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in done and node.op not in ("placeholder", "get_attr"):
            done.add(node)
            yield node
            stack += [*_read_by(node), *(user for user in node.users if _is_write_into_new(user, node))]


def _is_write_into_new(node: fx.Node, tensor: fx.Node) -> bool:
    """``new[index] = value``, where ``new`` is a view of nothing."""
    is_new = tensor.op == "call_method" and tensor.target.startswith("new_")
    return is_new and node.target is operator.setitem and node.args[0] is tensor


def _transforms(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes of each vmap, from its beginning to its end, inner ones first."""
    nodes = list(graph.nodes)
    begun: list[int] = []
    for index, node in enumerate(nodes):
        if node.target is torch._functorch.predispatch._vmap_increment_nesting:
            begun.append(index)
        elif node.target is torch._functorch.predispatch._vmap_decrement_nesting:
            yield nodes[begun.pop() : index + 1]
