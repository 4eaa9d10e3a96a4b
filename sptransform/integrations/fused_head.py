"""The head that TRL's trainers give a model (``fused_lm_head=True``), as ops that a rule shards by token.

TRL computes log-probabilities of tokens, and statistics of their logits, in a ``torch.autograd.Function`` that
writes into buffers or calls Triton kernels, which no graph holds. Here the same forward and backward are the bodies of
two ops: each rank runs TRL's code on its own tokens, and the gradient of the head's weight is summed over ranks.

While a model is captured TRL finds :class:`TokenScores` in the place of its function; elsewhere its function runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sptransform.rules.einsum import rule
from sptransform.rules.rule import OpCall, OpRule

# what TRL's function returns beside the log-probabilities, in its order; the second has gradients
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_trl_function: Any = None


class _Context:
    """What TRL's function asks of the ``ctx`` that autograd would give it."""

    def __init__(self, saved: tuple[Any, ...] = (), needs_input_grad: tuple[bool, ...] = ()) -> None:
        self.saved_tensors, self.needs_input_grad = saved, needs_input_grad

    def save_for_backward(self, *saved: Any) -> None:
        self.saved_tensors = saved

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


@torch.library.custom_op("sptransform_trl::token_scores", mutates_args=())
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    outputs: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TRL's forward. What ``outputs`` does not name has no meaning.

    Args:
        hidden: [n, h].
        weight: [v, h].
        targets: [n].
        bias: [v].
        temperature, chunk_size, softcap, logit_scale: TRL's, as they are.
        outputs: names of statistics, between spaces.
        dtype: that of the product, under autocast another one than that of ``hidden``.

    Returns:
        log-probabilities, entropies, log-sums of squared probabilities, mean logits, whether the target is the
        likeliest, and logsumexps, each [n].
    """
    ctx = _Context()
    with _product_in(dtype, hidden):
        scores = _trl_function.forward(
            ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, tuple(outputs.split())
        )
    log_probs, *statistics = scores
    log_z = ctx.saved_tensors[4]
    given = [torch.zeros_like(like) if x is None else x for x, like in zip(statistics, [log_z] * 4, strict=True)]
    given[3] = given[3].bool()
    return log_probs, *given, log_z.clone()


@token_scores.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    first, *more = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(5))
    return (first, *more[:3], hidden.new_empty(hidden.shape[0], dtype=torch.bool), more[3])


@torch.library.custom_op("sptransform_trl::token_scores_backward", mutates_args=())
def token_scores_backward(
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    log_z: Tensor,
    entropy: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's backward: gradients of ``hidden``, ``weight`` and ``bias``, which is empty where there is none."""
    ctx: Any = _Context((hidden, weight, bias, targets, log_z, entropy), (True, True, bias is not None))
    ctx.compute_dtype, ctx.chunk_size = dtype, chunk_size
    ctx.kernel_args = {
        "logit_scale": logit_scale,
        "softcap": softcap or 1.0,
        "inv_t": 1 / temperature,
        "HAS_SOFTCAP": softcap is not None,
    }
    of_hidden, of_weight, of_bias, *_ = _trl_function.backward(ctx, grad_log_probs, grad_entropy)
    return of_hidden, of_weight, hidden.new_empty(0) if of_bias is None else of_bias


@token_scores_backward.register_fake
def _(log_probs: Any, entropy: Any, hidden: Tensor, weight: Tensor, targets: Any, bias: Any, *rest: Any) -> Any:
    of_bias = hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(hidden), torch.empty_like(weight), of_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, temperature, chunk_size, softcap, logit_scale, outputs, dtype = inputs
    has_entropy = "entropy" in outputs.split()
    ctx.save_for_backward(hidden, weight, targets, bias, output[5], output[1] if has_entropy else output[5])
    ctx.numbers, ctx.has_entropy = (temperature, chunk_size, softcap, logit_scale, dtype), has_entropy


def _backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor, *rest: Any) -> tuple[Any, ...]:
    hidden, weight, targets, bias, log_z, entropy = ctx.saved_tensors
    of_hidden, of_weight, of_bias = token_scores_backward(
        grad_log_probs, grad_entropy if ctx.has_entropy else None, hidden, weight, targets, bias, log_z, entropy,
        *ctx.numbers,
    )  # fmt: skip
    return of_hidden, of_weight, None, None if bias is None else of_bias, *[None] * 6


token_scores.register_autograd(_backward, setup_context=_save)


class TokenScores:
    """What TRL finds in the place of its ``ChunkedLogProbFunction``."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = _STATISTICS,
    ) -> tuple[Tensor | None, ...]:
        """As TRL's function: log-probabilities [n] and the statistics that ``outputs`` names, None for others."""
        if not torch.compiler.is_compiling():
            return _trl_function.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        log_probs, entropy, *others, _ = torch.ops.sptransform_trl.token_scores.default(
            hidden, weight, targets, bias, temperature, chunk_size, softcap, logit_scale, " ".join(outputs), dtype
        )
        found = [entropy, *(x.detach() for x in others)]
        return log_probs, *(x if name in outputs else None for name, x in zip(_STATISTICS, found, strict=True))


def capture_trl() -> None:
    """Put :class:`TokenScores` in the place of TRL's function, if TRL is in use."""
    global _trl_function
    utils = sys.modules.get("trl.trainer.utils")
    function = getattr(utils, "_ChunkedLogProbFunction", None)
    if function is None or function is TokenScores:
        return
    _trl_function, picks_tokens = function, utils._use_triton

    def picks(device: torch.device) -> bool:
        # on GPUs TRL leaves tokens without a label out, whose number is data; ranks share the sequence by place
        return not torch.compiler.is_compiling() and picks_tokens(device)

    utils._ChunkedLogProbFunction, utils._use_triton = TokenScores, picks


def _by_token(call: OpCall) -> OpRule:
    bias = ", v" if len(call.operand_shapes) > 3 else ""
    return rule(f"n h, v h, n{bias} -> n, n, n, n, n, n", replicated="h v", heavy=True)(call)


RULES = {torch.ops.sptransform_trl.token_scores.default: _by_token}


def _product_in(dtype: torch.dtype, hidden: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(hidden.device.type, dtype, enabled=dtype != hidden.dtype)
