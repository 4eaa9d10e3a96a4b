"""Compute the logits of a loss for a chunk of tokens at a time, forward and backward.

Before::

    %logits = aten.linear(%x, %weight)
    %wide = aten.to.dtype(%logits, float32)
    %loss = aten.cross_entropy_loss(%wide, %labels, None, 2)

after, where no tensor has more logits than a chunk::

    %both = sptransform.linear_cross_entropy(%x, %weight, %labels, None, [], chunk=1024, program='%1 = to.dtype(..)')
    %losses = getitem(%both, 0)
    %loss = aten.sum(%losses)

1. What stands between the product and the loss is read by ``losses/logits.py``: ops on each logit (casts, scales, a
   softcap, masked classes), and ops that move tokens or take a range of classes. What is read of the logits is read by
   ``losses/readers.py``: cross-entropy with class indices, spelled with a log-softmax too, and the logsumexp beside it.
2. Everything that reads the product has to be of this kind. A product of which logits are returned is left.
3. With ``loss_chunk="auto"`` only where the logits of a rank have 64 MiB or more; then a chunk has 32 MiB, and at least
   256 tokens. A number of tokens that is open counts as 4096 a rank.
4. Readers of the same tokens share one op.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from sptransform.diagnostics import provenance
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.edit import emit_like
from sptransform.losses.logits import Product, all_logits, product_at
from sptransform.losses.readers import Labels, Reader, readers_at

aten, sp = torch.ops.aten, torch.ops.sptransform

log = logging.getLogger(__name__)

LARGE, CHUNK, FEWEST, OPEN = 64 << 20, 32 << 20, 256, 4096


@dataclass(frozen=True)
class ChunkLosses(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if context.loss_chunk is None:
            return
        graph.eliminate_dead_code()  # a reader of the logits that nobody reads
        large = [node for node in graph.nodes if dataflow.handles_tensors(node) and chunk_size(node, context)]
        products = [product_at(node, context.rules) for node in large]
        for product in products:
            if product is not None:
                _chunk(product, context)
        is_found = graph.find_nodes(op="call_function", target=sp.linear_cross_entropy.default)
        if context.loss_chunk != "auto" and not is_found:
            log.warning("loss_chunk=%s has no effect: no linear is read by a cross-entropy alone", context.loss_chunk)
        graph.eliminate_dead_code()


def _chunk(product: Product, context: Context) -> None:
    """Replace the product and what reads it, if that can be."""
    found = [found for pair in all_logits(product, context.rules) for found in readers_at(*pair)]
    readers = [reader for reader in found if isinstance(reader, Reader)]
    if not any(reader.labels for reader in readers):
        return
    others = [node for node in found if isinstance(node, fx.Node)]
    groups = list(_by_tokens(readers).values())
    if others:
        _leave(product, f"%{others[0].name} reads them too" if others[0].op != "output" else "they are returned")
    elif any(reader.logits.program() is None for reader in readers):
        _leave(product, "an op on them has no gradient here, or another dtype under autocast")
    elif any(len({reader.labels for reader in group if reader.labels}) != 1 for group in groups):
        _leave(product, "their readers have other tokens, or other labels, than each other")
    elif not all(map(_is_ready, groups)):
        _leave(product, "labels are made after the logits are read")
    else:
        for group in groups:
            _replace(group, chunk_size(product.node, context))


def _leave(product: Product, reason: str) -> None:
    where = provenance.source_line(product.node)
    log.info("the logits %%%s exist for all tokens at once: %s; at %s", product.node.name, reason, where)


def chunk_size(logits: fx.Node, context: Context) -> int | None:
    """Tokens of a chunk; None if chunks save too little."""
    if context.loss_chunk != "auto":
        return context.loss_chunk
    shapes = dataflow.shapes(logits)
    if len(shapes) != 1 or len(shapes[0]) < 2 or not isinstance(shapes[0][-1], int) or not shapes[0][-1]:
        return None
    *tokens, classes = shapes[0]
    row = classes * max(dataflow.values(logits)[0].dtype.itemsize, 4)
    chunk = max(FEWEST, CHUNK // row)
    num_tokens = prod(tokens)
    own = num_tokens // context.mesh.size if isinstance(num_tokens, int) else OPEN
    return chunk if own * row >= LARGE and own > chunk else None


def _by_tokens(readers: Sequence[Reader]) -> Mapping[object, list[Reader]]:
    groups: dict[object, list[Reader]] = {}
    for reader in readers:
        groups.setdefault(reader.logits.tokens, []).append(reader)
    return groups


def _first(group: Sequence[Reader]) -> fx.Node:
    order = {node: index for index, node in enumerate(group[0].node.graph.nodes)}
    return min((reader.node for reader in group), key=order.__getitem__)


def _is_ready(group: Sequence[Reader]) -> bool:
    """Whether all that the op reads is made before the first of the readers."""
    order = {node: index for index, node in enumerate(group[0].node.graph.nodes)}
    first = min(order[reader.node] for reader in group)
    read = [x for reader in group for x in (reader.weight, reader.labels and reader.labels.node) if x is not None]
    return all(order[x] < first for x in (*read, *(x for reader in group for x in reader.logits.columns)))


def _replace(group: Sequence[Reader], chunk: int) -> None:
    at = _first(group)
    main = next(reader for reader in group if reader.labels)
    labels: Labels = main.labels
    x, weight, bias, columns = main.logits.emit_operands(at)
    index = emit_like(at, aten.squeeze.dim, labels.node, main.logits.dim) if labels.is_index else labels.node
    both = emit_like(
        at,
        sp.linear_cross_entropy.default,
        *(x, weight, index, bias, columns),
        chunk=chunk,
        program=str(main.logits.program()),
        ignore_index=labels.ignore_index,
        label_smoothing=labels.smoothing,
    )
    losses, logsumexps = (emit_like(at, operator.getitem, both, i) for i in range(2))
    for reader in group:
        reader.replace_by(losses if reader.labels else logsumexps, index, reader.node)
