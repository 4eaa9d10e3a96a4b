"""The passes, and the order in which they run."""

from __future__ import annotations

from sptransform.engine.pass_manager import Pass
from sptransform.engine.pipeline import Pipeline
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
from sptransform.passes.normalize.chunk_losses import ChunkLosses
from sptransform.passes.normalize.drop_empty_pieces import DropEmptyPieces
from sptransform.passes.normalize.drop_sequences import DropSequences
from sptransform.passes.normalize.open_composites import OpenComposites
from sptransform.passes.normalize.pad_with_zeros import PadWithZeros
from sptransform.passes.normalize.read_kernel_calls import ReadKernelCalls
from sptransform.passes.normalize.read_linear_cross_entropy import ReadLinearCrossEntropy
from sptransform.passes.normalize.read_score_masks import ReadScoreMasks
from sptransform.passes.normalize.recognize_attention import RecognizeAttention
from sptransform.passes.normalize.recognize_scans import RecognizeScans
from sptransform.passes.normalize.simplify_masks import SimplifyMasks
from sptransform.passes.normalize.split_biases import SplitBiases
from sptransform.passes.normalize.split_cross_entropy import SplitCrossEntropy
from sptransform.passes.normalize.split_means import SplitMeans
from sptransform.passes.normalize.undo_sorting import UndoSorting
from sptransform.passes.normalize.unrepeat_key_heads import UnrepeatKeyHeads

# rewrites of the single-device graph, into forms that rules shard best
NORMALIZE: tuple[Pass, ...] = (
    OpenComposites(),  # before all that match ops
    DropEmptyPieces(),
    UndoSorting(),
    ReadKernelCalls(),  # before the passes that match the model's own attention op
    ReadScoreMasks(),
    RecognizeAttention(),  # before the passes that match the model's own attention op
    UnrepeatKeyHeads(),  # before placing: attention must not demand repeated heads
    CastAttentionInputs(),  # after UnrepeatKeyHeads, to cast the unrepeated keys
    AttendByPosition(),  # after the passes that match the model's own attention op
    SimplifyMasks(),
    PadWithZeros(),
    RecognizeScans(),
    DropSequences(),  # once attention shows what sequences are; before ChunkLosses: logits that are returned are needed
    ReadLinearCrossEntropy(),
    SplitMeans(),
    ChunkLosses(),  # after SplitMeans, as it handles no means
    SplitCrossEntropy(),  # likewise, and what ChunkLosses leaves
    SplitBiases(),
)

# run once per mesh dim, on the one-rank graph that the dim before it left
DISTRIBUTE: tuple[Pass, ...] = (
    # placements, then the redistributes they need
    AssignPlacements(),
    InsertRedistributes(),
    FuseRedistributes(),
    BucketParameters(),
    # lowering; sizes become local last, since the passes before need global ones
    LowerRedistributes(),
    RecomputeGathers(),  # overrides some of the saves that lowering marks
    Localize(),
)

FINISH: tuple[Pass, ...] = (
    MergeGradientSums(),
    BucketGradients(),  # after all mesh dims, since each dim reads parameters one by one
    RestoreOutputOrder(),
    DecomposeCheckpointed(),  # last, since the other passes match captured ops
)

PIPELINE = Pipeline(NORMALIZE, DISTRIBUTE, FINISH)
