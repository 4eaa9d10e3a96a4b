"""flex_attention as attention whose mask is computed in the graph, for the passes to read.

Before, in Dynamo's graph, an op of two functions of one score and a mask of blocks::

    %flex = flex_attention(%q, %k, %v, %score_mod, (.., %kv_indices, .., %mask_mod), 0.25, ..)

after, in the captured graph, with a mask of queries x keys that ReadScoreMasks takes apart again::

    %mask = aten.ge.Tensor(%q_idx, %kv_idx)
    %attended = sptransform.ring_attention(%q, %k, %v, [%mask], [], mask='%0', scale=0.25)

The mask of blocks only says where the kernel need not look: ``mask_mod`` says the same, and what computes the blocks
is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log
from typing import Any

import torch
from torch import Tensor, fx

import sptransform.ops  # noqa: F401 - registers the op it calls
from sptransform.capture.score_mods import ScalarFunction, Scores
from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.graph.dataflow import projection

_FEWEST = 1 << 30  # the block size of a mask of blocks that says nothing


def attended(node: fx.Node, args: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What Dynamo's ``node``, called with ``args``, gives: out [B, H, S, E], logsumexp and maxima [B, H, S].

    Raises:
        CaptureError: it gives more than attention, or of functions that cannot be read.
    """
    query, key, value, score_mod, blocks, scale, _, score_captured, mask_captured = args
    _check_results(node)
    query, key, value = (_cast(x) for x in (query, key, value))
    if query.shape[0] != key.shape[0]:
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    sizes = (*query.shape[:3], key.shape[2])
    indices = [
        torch.arange(size, device=query.device).view([size if d == at else 1 for d in range(4)])
        for at, size in enumerate(sizes)
    ]
    seen = None
    if _hides_nothing(blocks[-1]):
        _check_blocks(node, blocks, sizes)
    else:
        seen = ScalarFunction(blocks[-1]).of(indices, mask_captured)
        seen = seen if seen.dim() else seen.view(1, 1, 1, 1)
    scores = ScalarFunction(score_mod).of([Scores(), *indices], score_captured)
    if not isinstance(scores, Scores):
        _refuse(node, "flex_attention calls a score_mod that forgets the score", "what it returns is computed without")
    mask = _mask(node, seen, scores)
    cap = scores.height or 0.0
    out, logsumexp, _ = torch.ops.sptransform.ring_attention(
        query,
        key,
        value,
        [] if mask is None else [mask],
        [],
        mask="" if mask is None else "%0",
        scale=scale * scores.factor * (cap or 1.0),
        softcap=cap,
    )
    return out, logsumexp / log(2), logsumexp


def _hides_nothing(mask_mod: fx.GraphModule) -> bool:
    """Whether it is the function that flex_attention takes where the user gives none, which returns a new true."""
    (returned,) = mask_mod.graph.output_node().args
    return returned.target == "new_ones"


def _mask(node: fx.Node, seen: Tensor | None, scores: Scores) -> Tensor | None:
    """One mask, of booleans or added to the scores."""
    if scores.hidden is not None:
        seen = ~scores.hidden if seen is None else seen & ~scores.hidden
    if scores.bias is None:
        return seen
    if scores.bias.requires_grad:
        _refuse(
            node,
            "flex_attention adds a bias that is trained to the scores",
            "a bias with a gradient, which would have queries x keys entries",
            "bias.detach(); or a mask of scaled_dot_product_attention with strategy='ulysses'",
        )
    return scores.bias if seen is None else torch.where(seen, scores.bias, -inf)


def _cast(x: Tensor) -> Tensor:
    """``x`` as the op takes it, which under autocast casts."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _check_results(node: fx.Node) -> None:
    read = [user for user in node.users if projection(user) != (node, 0) and _is_read(user)]
    if read:
        _refuse(
            node,
            "only the attended values of flex_attention are known, which something reads more of",
            f"%{read[0].name} is read",
            "no return_lse, no return_aux: they have no gradient here",
        )


def _is_read(node: fx.Node) -> bool:
    """Whether something that the graph returns is computed from it."""
    done, stack = set(), [node]
    while stack:
        reader = stack.pop()
        if reader.op == "output":
            return True
        if reader not in done:
            done.add(reader)
            stack.extend(reader.users)
    return False


def _check_blocks(node: fx.Node, blocks: Sequence[Any], sizes: Sequence[Any]) -> None:
    """A mask of blocks beside a mask_mod that hides nothing must say nothing either."""
    if min(blocks[-3], blocks[-2]) < _FEWEST:
        _refuse(
            node,
            "flex_attention is called with blocks of a mask whose mask_mod says nothing of them",
            f"blocks of {blocks[-3]} x {blocks[-2]}, for {sizes[2]} queries and {sizes[3]} keys",
            "a mask_mod that says what the blocks say: create_block_mask(mask_mod, ..)",
        )


def _refuse(node: fx.Node, what: str, found: str, fix: str = "a score_mod that returns the score, changed") -> None:
    raise CaptureError(describe(what, node=node, found=found, fix=fix))
