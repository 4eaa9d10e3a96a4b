"""The passes, and the order in which they run."""

from __future__ import annotations

from sptransform.pass_manager import Pass
from sptransform.passes.bucket_gradients import BucketGradients
from sptransform.passes.cast_attention_inputs import CastAttentionInputs
from sptransform.passes.drop_empty_pieces import DropEmptyPieces
from sptransform.passes.gather_parameters import GatherParameters
from sptransform.passes.insert_redistributes import InsertRedistributes
from sptransform.passes.localize import Localize
from sptransform.passes.lower_redistributes import LowerRedistributes
from sptransform.passes.merge_replicates import MergeReplicates
from sptransform.passes.move_keys_unrepeated import MoveKeysUnrepeated
from sptransform.passes.open_checkpointed import OpenCheckpointed
from sptransform.passes.pack_moves import PackMoves
from sptransform.passes.place import Place
from sptransform.passes.read_masks import ReadMasks
from sptransform.passes.regather import Regather
from sptransform.passes.return_in_order import ReturnInOrder
from sptransform.passes.split_biases import SplitBiases
from sptransform.passes.split_cross_entropy import SplitCrossEntropy
from sptransform.passes.split_means import SplitMeans

# what one device computes, in the form the rules read best
NORMALIZE: tuple[Pass, ...] = (
    DropEmptyPieces(),
    MoveKeysUnrepeated(),  # before placing: attention must not demand repeated heads
    CastAttentionInputs(),  # the keys as they are, now that attention reads those
    ReadMasks(),  # after the passes that look for attention as the model wrote it
    SplitMeans(),
    SplitCrossEntropy(),  # of sums
    SplitBiases(),
)

# one mesh dim; of several, the graph of one rank of the first is what the next distributes
DISTRIBUTE: tuple[Pass, ...] = (
    # placements, then what they cost
    Place(),
    InsertRedistributes(),
    PackMoves(),
    GatherParameters(),
    # from abstract to concrete; sizes become local last, when nothing needs global ones any more
    LowerRedistributes(),
    Regather(),  # of what lowering marks as saved, some is not to be
    Localize(),
)

FINISH: tuple[Pass, ...] = (
    MergeReplicates(),
    BucketGradients(),  # of all mesh dims: the next dim reads parameters one by one
    ReturnInOrder(),
    OpenCheckpointed(),  # after all that reads captured ops
)

PIPELINE: tuple[Pass, ...] = (*NORMALIZE, *DISTRIBUTE, *FINISH)
