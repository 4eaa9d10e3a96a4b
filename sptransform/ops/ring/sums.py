"""How running sums over blocks are updated: in place, or out of place as nodes of a functional graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.ring.blocks import add_block_, merge_block_
from sptransform.ops.ring.messages import add_to_message_
from sptransform.ops.ring.operand_sums import add_to_operand_

_sp = torch.ops.sptransform


@dataclass(frozen=True)
class Sums:
    """The ops ``merge_block``, ``add_block``, ``add_to_message`` and ``add_to_operand``; each may write into its
    accumulator.
    """

    merge: Callable[..., tuple[Tensor, Tensor]]
    add: Callable[[Tensor, Tensor, int], Tensor]
    add_to_message: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    add_to_operand: Callable[[Tensor, Tensor, int, list[int]], Tensor]


def _merge(out: Tensor, lse: Tensor, *block: Any) -> tuple[Tensor, Tensor]:
    merge_block_(out, lse, *block)
    return out, lse


def _add(total: Tensor, block: Tensor, start: int) -> Tensor:
    add_block_(total, block, start)
    return total


def _add_to_message(message: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    add_to_message_(message, key, value, start)
    return message


def _add_to_operand(total: Tensor, part: Tensor, start: int, columns: list[int]) -> Tensor:
    add_to_operand_(total, part, start, columns)
    return total


IN_PLACE = Sums(_merge, _add, _add_to_message, _add_to_operand)
AS_NODES = Sums(_sp.merge_block.default, _sp.add_block.default, _sp.add_to_message.default, _sp.add_to_operand.default)
