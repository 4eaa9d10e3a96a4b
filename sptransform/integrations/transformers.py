"""``attn_implementation="sptransform"`` for models of Hugging Face Transformers; importing this module registers it.

``prepare`` and ``parallelism_config``, for trainers, are in :mod:`trainer` and :mod:`accelerate`.

Attention is then ``torch.ops.sptransform.ring_attention``, which gets its mask as bounds, operands and a program. So no
tensor of queries x keys exists, not on one device either, and what shards the op finds the mask among its arguments.

1. A mask is what Transformers' own function of it says (:mod:`index_masks`): causal, windows, chunks, blocks, padding,
   documents. Functions that a model brings itself are refused. A tensor of 4 dimensions is taken as it is.
2. Documents packed into a row are told apart by ``position_ids``, as in Transformers, and also beside padding; or by
   ``cu_seq_lens_q`` and ``cu_seq_lens_k``, as for its flash attention.
3. Query heads may be more than key heads, values larger or smaller than keys. Soft caps, sinks, dropout and the scale
   are arguments of the op.

Without Transformers this module does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sptransform.ops  # noqa: F401 - registers ring_attention
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.integrations import index_masks
from sptransform.integrations.accelerate import parallelism_config
from sptransform.integrations.documents import documents_of_lengths, documents_of_positions
from sptransform.integrations.index_masks import Band, UnreadableMaskError, compares_queries, conjuncts
from sptransform.integrations.position_mask import PositionMask
from sptransform.integrations.trainer import prepare

__all__ = ["NAME", "attention", "parallelism_config", "position_mask", "prepare"]

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError:
    AttentionInterface = AttentionMaskInterface = None

NAME = "sptransform"
_SDPA = "attn_implementation='sdpa'"
# arguments of attention that change its result and that the op does not know
_UNKNOWN = ("position_bias", "head_mask", "block_table", "k_cache", "v_cache")


def position_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | PositionMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PositionMask:
    """Transformers' mask function as a mask by positions.

    Args:
        batch_size, q_length, kv_length: the sizes of the mask.
        q_offset, kv_offset: the index of the first query and key.
        mask_function: (batch, head, query, key) -> visible.
        attention_mask: boolean [batch_size, keys], False for padding; missing keys at the end are padding. Or a mask
            that was made before, as generation with a static cache does.
        use_vmap: whether ``mask_function`` is in part the model's own.
        device: that of the mask.
        kwargs: what other forms of masks need.

    Raises:
        UsageError: the function is the model's own.
    """
    if isinstance(attention_mask, PositionMask):
        return attention_mask
    if use_vmap or mask_function is None:
        raise UsageError(_refused("a mask function of the model's own (or_mask_function, and_mask_function)"))
    try:
        visible = index_masks.read(mask_function, q_length, kv_length, q_offset, kv_offset, device)
        terms, seen = conjuncts(visible), None
        if attention_mask is not None and not _is_whole(attention_mask):
            missing = kv_length + kv_offset - attention_mask.shape[-1]
            if isinstance(missing, int) and missing > 0:
                attention_mask = nn.functional.pad(attention_mask, (0, missing))
            keys = index_masks.read(_only_keys(attention_mask), q_length, kv_length, q_offset, kv_offset, device)
            terms = [*terms, keys]
            seen = attention_mask
    except UnreadableMaskError as error:
        raise UsageError(_refused("a mask function that is not one of Transformers' own")) from error
    return PositionMask(q_length, kv_length, device, terms, seen, q_offset)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PositionMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface.

    Args:
        module: the attention layer.
        query: [B, H, s, D].
        key: [B, K, t, D], where K divides H.
        value: [B, K, t, E].
        attention_mask: of :func:`position_mask`; or boolean, or added to the scores, [B or 1, H or 1, s or 1, t];
            None for what ``is_causal`` and ``sliding_window`` say.
        dropout: the probability with which an attention weight is dropped.
        scaling: a factor of the scores, by default 1 / sqrt(D).
        is_causal: by default what the module says.
        sliding_window: how many tokens a query sees, itself among them. A mask has it already.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: a logit for each query head [H] that takes part in the softmax and sees no value.
        position_ids: [B or 1, s]; where they do not go on by one, a document begins.
        cu_seq_lens_q, cu_seq_lens_k: where documents begin and end in a batch of one row, [documents + 1].
        kwargs: what other implementations need.

    Returns:
        [B, s, H, E], and None for the attention weights.

    Raises:
        UsageError: an argument that changes the result cannot be followed.
    """
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise UsageError(_refused(f"{name}, an argument of attention that it does not have"))
    if kwargs.get("output_attentions"):
        raise UsageError(_refused("output_attentions=True", "attn_implementation='eager'"))
    if query.shape[0] != key.shape[0]:
        raise UsageError(_refused(f"queries of {query.shape[0]} sequences over keys of {key.shape[0]}"))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    query, key, value = _cast(query, key, value)
    rows, columns, bounds = _mask_arguments(
        attention_mask, query, key, causal, sliding_window, position_ids, (cu_seq_lens_q, cu_seq_lens_k)
    )
    # what most models do not have is not passed
    sinks = {} if s_aux is None else {"sinks": s_aux}
    caps = {} if softcap is None else {"softcap": softcap}
    out, _, _ = torch.ops.sptransform.ring_attention(
        query, key, value, rows, columns, **sinks, **bounds, **caps, dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def _mask_arguments(
    mask: PositionMask | Tensor | None,
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: int | None,
    position_ids: Tensor | None,
    lengths: tuple[Tensor | None, Tensor | None],
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """``rows``, ``columns`` and the bounds and program of ``ring_attention``."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    packed = lengths[0] is not None or lengths[1] is not None
    if isinstance(mask, Tensor):
        if packed:
            raise UsageError(_refused("cu_seq_lens beside a mask of queries x keys", "one of the two"))
        return _given(mask)
    if mask is None:
        mask = PositionMask(num_queries, num_keys, query.device, _bounds(causal and num_queries > 1, window))
    elif (mask.num_queries, mask.num_keys) != (num_queries, num_keys):
        found = f"a mask of {mask.num_queries} x {mask.num_keys} for {num_queries} queries and {num_keys} keys"
        raise UsageError(_refused(found))
    elif not packed and _tells_documents(position_ids, num_queries):
        if num_queries != num_keys:
            _check_one_document(position_ids, mask)
        elif not any(compares_queries(term) for term in mask.terms):
            seen = None if mask.visible is None else mask.visible[:, :num_keys]
            documents = documents_of_positions(position_ids, seen)
            if documents is not None:
                mask = mask.also(index_masks.same(documents, documents))
    if packed:
        mask = mask.also(_same_document(lengths, query, key, causal))
    return mask.arguments()


def _given(mask: Tensor) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    if mask.dim() != 4:
        raise UsageError(_refused(f"a mask of {mask.dim()} dimensions"))
    if mask.requires_grad:
        raise UsageError(_refused("a mask that requires a gradient", f"mask.detach(), or {_SDPA}"))
    rows, columns = ([], [mask]) if mask.shape[2] == 1 else ([mask], [])
    return rows, columns, {"mask": "%0"}


def _bounds(causal: bool, window: int | None) -> list[index_masks.Term]:
    if window is not None and not causal:
        raise UsageError(_refused("a window of attention that is not causal, and no mask"))
    if not causal:
        return []
    return [Band(0, None if window is None else window - 1)]


def _check_one_document(position_ids: Tensor, mask: PositionMask) -> None:
    """Refuse documents beside keys of earlier calls, or of calls to come, of which nobody knows their document."""
    if torch.compiler.is_compiling():  # nobody knows the positions either
        return
    first, size, seen = int(mask.first_query), mask.num_queries, None
    starts = position_ids[:, 0] == first
    if mask.visible is not None:
        seen = mask.visible[:, first : first + size]
        starts = starts | (position_ids[:, 0] == mask.visible[:, :first].sum(-1)) | ~seen[:, 0]
    if documents_of_positions(position_ids, seen) is not None or not bool(starts.all()):
        raise UsageError(_refused("positions of several documents beside a cache of other tokens", "use_cache=False"))


def _tells_documents(position_ids: Tensor | None, num_queries: int) -> bool:
    if position_ids is None or position_ids.dim() != 2 or num_queries == 1:
        return False
    return position_ids.shape[1] == num_queries


def _same_document(
    lengths: tuple[Tensor | None, Tensor | None], query: Tensor, key: Tensor, causal: bool
) -> index_masks.Term:
    of_queries, of_keys = lengths
    if of_queries is None or of_keys is None:
        raise UsageError(_refused("one of cu_seq_lens_q and cu_seq_lens_k", "both, which may be one tensor"))
    if query.shape[0] != 1:
        raise UsageError(_refused(f"cu_seq_lens and {query.shape[0]} rows", "all documents in one row"))
    if causal and query.shape[2] != key.shape[2]:
        raise UsageError(_refused("cu_seq_lens, and causal attention of queries to another number of keys"))
    # while a graph is captured nobody knows what they hold
    if causal and not torch.compiler.is_compiling() and not torch.equal(of_queries, of_keys):
        found = "cu_seq_lens_q that are not cu_seq_lens_k, and causal attention"
        raise UsageError(_refused(found, "one tensor for both"))
    documents = documents_of_lengths(of_queries, query.shape[2])
    if of_keys is of_queries:
        return index_masks.same(documents, documents)
    return index_masks.same(documents, documents_of_lengths(of_keys, key.shape[2]))


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast the dtypes that ``scaled_dot_product_attention`` would compute in."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        found = f"query, key and value of {query.dtype}, {key.dtype} and {value.dtype}"
        raise UsageError(_refused(found, "one dtype, or torch.autocast"))
    return query, key, value


def _only_keys(visible: Tensor) -> Callable[..., Any]:
    return lambda batch, head, query, key: visible[batch, key]


def _is_whole(attention_mask: Tensor) -> bool:
    """Whether it is known that nothing is padding; while a graph is captured it is not."""
    return not torch.compiler.is_compiling() and bool(attention_mask.all())


def _refused(found: str, fix: str = _SDPA) -> str:
    return describe(f"attn_implementation='{NAME}' cannot compute this attention", found=found, fix=fix)


if AttentionInterface is not None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, position_mask)
