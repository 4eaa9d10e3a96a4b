"""Cross-entropy of logits that a linear makes, token by token, without all logits; the classes may be cut.

As in the vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al., arXiv 1909.08053, §3), ranks that have a
part of the classes each exchange a few numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sptransform.ops.communication import collectives
from sptransform.ops.library import composite
from sptransform.sharding.partition import Partition

_sp = torch.ops.sptransform


@composite(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, Tensor? bias, Tensor[] columns, *, int chunk, "
    "str program='%0', int ignore_index=-100, float label_smoothing=0.0, str classes='', str group_name='') "
    "-> (Tensor loss, Tensor lse)"
)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    columns: Sequence[Tensor],
    *,
    chunk: int,
    program: str = "%0",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    classes: str = "",
    group_name: str = "",
) -> tuple[Tensor, Tensor]:
    """The loss of every token, 0 where the label is ``ignore_index``; and the logsumexp of its logits.

    Both have the dtype in which sums of logits are computed, float32 for 16 bits.

    Args:
        x: [.., d].
        weight: [classes, d].
        labels: class indices [..].
        bias: [classes].
        columns: operands of the program, [classes] or of one entry.
        chunk: of how many tokens the logits exist at a time.
        program: a mask program (``ops/mask_program.py``) that makes the logits of %0, the product, and the columns.
        ignore_index, label_smoothing: as those of torch's ``cross_entropy``.
        classes: the partition of the classes, of which this rank has a part of weight, bias and columns; "" if it has
            all. The group then has the others.
    """
    num_classes = Partition.parse(classes).size if classes else weight.shape[0]
    is_valid = labels != ignore_index
    if classes:
        own = _sp.local_index(labels.where(is_valid, 0), classes, group_name)
    else:
        own = labels.where(labels >= 0, num_classes)  # out of range
    own = own.where(is_valid, -1)
    is_smoothed = label_smoothing != 0.0
    sums = _sp.logit_sums(
        x.flatten(0, -2), weight, own.flatten(), bias, columns, program=program, chunk=chunk, summed=is_smoothed
    )
    if classes:
        sums = _joined(*sums, own.flatten() >= 0, weight.shape[0], group_name)
    largest, logsum, picked, total = (each.view(labels.shape) for each in sums)
    loss = logsum - picked
    if is_smoothed:
        every = num_classes * logsum - total
        loss = (1 - label_smoothing) * loss + label_smoothing / num_classes * every
    return loss.where(is_valid, 0.0), largest + logsum


def _joined(
    largest: Tensor, logsum: Tensor, picked: Tensor, total: Tensor, is_own: Tensor, num_own: int, group: str
) -> tuple[Tensor, ...]:
    """What ``logit_sums`` gives, of the classes of all ranks: one maximum, and one sum, are all-reduced."""
    of_all = collectives.all_reduce(largest, group, "max")
    down = largest - of_all
    terms = [(logsum + down).exp(), picked + down.where(is_own, 0.0)]
    terms.append(total + num_own * down if num_own else total)
    powers, picked, total = _sp.all_reduce(torch.stack(terms), group, True).unbind()
    return of_all, powers.log(), picked, total
