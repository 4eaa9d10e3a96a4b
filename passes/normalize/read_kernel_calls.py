"""Write calls of attention kernels as attention that strategies place.

Before, a call of flash-attn over documents packed into one sequence, of which ``%ends`` says where they end::

    %flash = flash_attn._flash_attn_varlen_forward(%q, %k, %v, %ends, %ends, 5, 5, 0.0, 0.25, True)
    %out : f32[8,4,16] = getitem(%flash, 0)

after, with tensors that have one number a token::

    %document = aten.searchsorted.Tensor(%ends, %arange, out_int32=True, right=True)
    %attended = sptransform.ring_attention(%q_1, %k_1, %v_1, [%document_of_queries], [%document],
                                           mask='%2 = eq.Tensor(%0, %1)', nearest=0, scale=0.25)
    %out : f32[8,4,16] = ..

1. ``op_rules/attention_kernels.py`` says which ops are kernels, and what their arguments mean.
2. Without a mask, or with a causal one over as many queries as keys, it is ``scaled_dot_product_attention``.
3. A cap on the scores is an argument. Any other mask becomes bounds and a program, see ``masks/kernel_masks.py``, under
   every strategy.
4. A call is refused if something reads more of it than the attended values, or if it asks for what attention here does
   not know: paged or quantized keys.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.edit import emit_like, rename, succeed
from sptransform.masks.documents import Documents
from sptransform.masks.kernel_masks import visible_in
from sptransform.masks.mask_read import MaskRead, emit_attention
from sptransform.op_rules.attention_kernels import KernelCall, kernel_of, read_call

aten = torch.ops.aten


@dataclass(frozen=True)
class ReadKernelCalls(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        documents = Documents()
        for node in list(graph.nodes):
            if node.op == "call_function" and kernel_of(node.target) is not None:
                call = read_call(node)
                _check(call, node)
                _replace_results(node, _attended(call, node, documents))
        graph.eliminate_dead_code()


def _attended(call: KernelCall, node: fx.Node, documents: Documents) -> fx.Node:
    """The call's first result, in the kernel's layout."""
    is_packed = call.documents is not None
    query, key, value = (_heads_first(x, is_packed, node) for x in (call.query, call.key, call.value))
    num_queries, num_keys = dataflow.shape(query)[2], dataflow.shape(key)[2]
    is_plain = not is_packed and call.slopes is None and call.before is None and not call.softcap
    is_square = call.after is None or (call.after == 0 and num_queries == num_keys)
    if is_plain and is_square:
        is_grouped = dataflow.shape(query)[1] != dataflow.shape(key)[1]
        out = emit_like(
            node,
            aten.scaled_dot_product_attention.default,
            query,
            key,
            value,
            None,
            call.dropout_p,
            call.after == 0,
            scale=call.scale,
            enable_gqa=is_grouped,
        )
    else:
        visible = visible_in(call, num_queries, num_keys, node, documents)
        new = emit_attention(
            node,
            (query, key, value),
            MaskRead.of(visible),
            visible.band,
            dropout_p=call.dropout_p,
            scale=call.scale,
            softcap=call.softcap,
        )
        rename(new, "ring_attention")
        out = emit_like(node, operator.getitem, new, 0)
    out = emit_like(node, aten.transpose.int, out, 1, 2)
    return emit_like(node, aten.squeeze.dim, out, 0) if is_packed else out


def _heads_first(x: fx.Node, is_packed: bool, before: fx.Node) -> fx.Node:
    """``x`` as [batch, heads, sequence, width]; packed documents are a batch of one."""
    if is_packed:
        x = emit_like(before, aten.unsqueeze.default, x, 0)
    return emit_like(before, aten.transpose.int, x, 1, 2)


def _replace_results(node: fx.Node, out: fx.Node) -> None:
    for user in list(node.users):
        if dataflow.projection(user) == (node, 0):
            succeed(user, out)
        else:
            user.graph.erase_node(user)
    node.graph.erase_node(node)


def _check(call: KernelCall, node: fx.Node) -> None:
    """Raise for calls that are more than the attention this package knows."""
    read = [user for user in node.users if user.users and dataflow.projection(user) != (node, 0)]
    if read or any(dataflow.projection(user) is None for user in node.users):
        name = f"%{read[0].name}, result {read[0].args[1]} of the op" if read else "the op's results as they are"
        _refuse(node, "only the attended values of a kernel are known, which something reads more of", name,
                "no return_attn_probs, no return_aux: the logsumexp of a shard is not that of all keys")  # fmt: skip
    for name, given in call.refused.items():
        _refuse(node, "an attention kernel is asked for what attention over shards does not know",
                f"{name}={given}", f"the call without {name}")  # fmt: skip
    slopes = () if call.slopes is None else dataflow.shape(call.slopes)
    if call.documents is not None and len(slopes) > 1:
        _refuse(node, "documents packed into one sequence have slopes of their own",
                f"%{call.slopes.name} of shape {list(slopes)}", "alibi_slopes of shape [heads]")  # fmt: skip


def _refuse(node: fx.Node, what: str, found: str, fix: str) -> None:
    raise UsageError(describe(what, node=node, found=found, fix=fix))
