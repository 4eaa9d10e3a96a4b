"""The passes, and the order in which they run."""

from __future__ import annotations

from sptransform.pass_manager import Pass
from sptransform.passes.bucket_gradients import BucketGradients
from sptransform.passes.cast_attention_inputs import CastAttentionInputs
from sptransform.passes.drop_empty_pieces import DropEmptyPieces
from sptransform.passes.insert_redistributes import InsertRedistributes
from sptransform.passes.localize import Localize
from sptransform.passes.lower_redistributes import LowerRedistributes
from sptransform.passes.move_keys_unrepeated import MoveKeysUnrepeated
from sptransform.passes.open_checkpointed import OpenCheckpointed
from sptransform.passes.pack_all_to_alls import PackAllToAlls
from sptransform.passes.place import Place
from sptransform.passes.split_means import SplitMeans

PIPELINE: tuple[Pass, ...] = (
    # what one device computes, in the form the rules read best
    DropEmptyPieces(),
    MoveKeysUnrepeated(),  # before placing: attention must not demand repeated heads
    CastAttentionInputs(),  # the keys as they are, now that attention reads those
    SplitMeans(),
    # placements, then what they cost
    Place(),
    InsertRedistributes(),
    PackAllToAlls(),
    BucketGradients(),
    # from abstract to concrete; sizes become local last, when nothing needs global ones any more
    LowerRedistributes(),
    Localize(),
    OpenCheckpointed(),  # after all that reads captured ops
)
