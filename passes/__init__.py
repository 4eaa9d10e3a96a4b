"""The passes, and the order in which they run."""

from __future__ import annotations

from sptransform.engine.pass_manager import Pass
from sptransform.passes.distribute.assign_placements import AssignPlacements
from sptransform.passes.distribute.bucket_parameters import BucketParameters
from sptransform.passes.distribute.fuse_redistributes import FuseRedistributes
from sptransform.passes.distribute.insert_redistributes import InsertRedistributes
from sptransform.passes.distribute.localize import Localize
from sptransform.passes.distribute.lower_redistributes import LowerRedistributes
from sptransform.passes.distribute.recompute_gathers import RecomputeGathers
from sptransform.passes.finish.bucket_gradients import BucketGradients
from sptransform.passes.finish.decompose_checkpointed import DecomposeCheckpointed
from sptransform.passes.finish.merge_gradient_sums import MergeGradientSums
from sptransform.passes.finish.restore_output_order import RestoreOutputOrder
from sptransform.passes.normalize.attend_by_position import AttendByPosition
from sptransform.passes.normalize.cast_attention_inputs import CastAttentionInputs
from sptransform.passes.normalize.drop_empty_pieces import DropEmptyPieces
from sptransform.passes.normalize.split_biases import SplitBiases
from sptransform.passes.normalize.split_cross_entropy import SplitCrossEntropy
from sptransform.passes.normalize.split_means import SplitMeans
from sptransform.passes.normalize.unrepeat_key_heads import UnrepeatKeyHeads

# what one device computes, in the form the rules read best
NORMALIZE: tuple[Pass, ...] = (
    DropEmptyPieces(),
    UnrepeatKeyHeads(),  # before placing: attention must not demand repeated heads
    CastAttentionInputs(),  # the keys as they are, now that attention reads those
    AttendByPosition(),  # after the passes that look for attention as the model wrote it
    SplitMeans(),
    SplitCrossEntropy(),  # of sums
    SplitBiases(),
)

# one mesh dim; of several, the graph of one rank of the first is what the next distributes
DISTRIBUTE: tuple[Pass, ...] = (
    # placements, then what they cost
    AssignPlacements(),
    InsertRedistributes(),
    FuseRedistributes(),
    BucketParameters(),
    # from abstract to concrete; sizes become local last, when nothing needs global ones any more
    LowerRedistributes(),
    RecomputeGathers(),  # of what lowering marks as saved, some is not to be
    Localize(),
)

FINISH: tuple[Pass, ...] = (
    MergeGradientSums(),
    BucketGradients(),  # of all mesh dims: the next dim reads parameters one by one
    RestoreOutputOrder(),
    DecomposeCheckpointed(),  # after all that reads captured ops
)

PIPELINE: tuple[Pass, ...] = (*NORMALIZE, *DISTRIBUTE, *FINISH)
