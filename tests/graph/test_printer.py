"""The one printed form of a node, in which goldens, errors and dumps are written."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sptransform.compiler.rewrite import rewrite
from sptransform.graph import notes
from sptransform.graph.printer import line, tensor_type, text
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, P, Placement, R, Shard
from tests.support.golden import Golden
from tests.support.graphs import captured, nodes_of
from tests.support.models import build


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "placement", "expected"),
    [
        ((2, 64), torch.float32, None, "f32[2,64]"),
        ((2, 64), torch.bfloat16, I, "bf16[2,64] I"),
        ((), torch.float64, P, "f64[] P"),
        ((3,), torch.bool, R, "b8[3] R"),
        ((3,), torch.complex64, None, "complex64[3]"),
        ((2, 64), torch.int64, Shard(1, Partition.contiguous(64, 4)), "i64[2,16@sp]"),
        ((2, 65), torch.float16, Shard(1, Partition.contiguous(65, 4)), "f16[2,17..14@sp]"),
        ((128, 8), torch.float32, Shard(0, Partition.contiguous(64, 4), 2), "f32[32@sp,8]"),
    ],
)
def test_tensor_types(shape: tuple[int, ...], dtype: torch.dtype, placement: Placement | None, expected: str) -> None:
    assert tensor_type(fake(*shape, dtype=dtype), placement) == expected


def test_local_values_have_their_own_size() -> None:
    shard = Shard(1, Partition.contiguous(65, 4))
    assert tensor_type(fake(2, 14), shard, is_local=True) == "f32[2,14@sp]"


OUTER, INNER = Shard(1, Partition.contiguous(64, 4)), Shard(1, Partition.contiguous(16, 2))


@pytest.mark.parametrize(
    ("placements", "expected"),
    [
        ((OUTER, R), "f32[2,8@outer] R@inner"),
        ((P, INNER), "f32[2,8@inner] P@outer"),
        ((OUTER, INNER), "f32[2,8@outer@inner]"),
        ((I, I), "f32[2,8] I"),
        ((I, P), "f32[2,8] I@outer P@inner"),
        ((None, INNER), "f32[2,8@inner]"),
    ],
)
def test_types_on_two_mesh_dims(placements: tuple[Placement | None, ...], expected: str) -> None:
    assert tensor_type(fake(2, 8), *placements, is_local=True) == expected
    whole = fake(2, 16 if placements[1] == INNER else 8)
    assert tensor_type(whole, *placements) == expected, "sizes are whole on the inner dim, local on the outer"


def test_lines() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = x.to(torch.float64).chunk(2, -1)
        return first * 2 + second, torch.randn(3, generator=None)

    gm, _ = captured(model, torch.zeros(2, 4))
    found = text(gm.graph.nodes).splitlines()
    assert found[0] == "%x : f32[2,4] = input"
    assert found[1] == "%to : f64[2,4] = aten.to.dtype(%x, float64)"
    assert found[2] == "%chunk : f64[2,2], f64[2,2] = aten.chunk(%to, 2, -1)"
    assert found[3] == "%getitem : f64[2,2] = getitem(%chunk, 0)"
    assert found[-1].startswith("return (%add, %randn")


def test_text_is_one_line_a_node() -> None:
    gm, _ = captured(lambda x: x.sin().cos(), torch.zeros(2))
    assert text(gm.graph.nodes).count("\n") == len(gm.graph.nodes) - 1


def test_arguments_that_are_not_there_are_not_shown() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = fake(2)
    node = graph.call_function(torch.ops.aten.sum.default, (x,), {"dtype": None})
    assert line(node) == "%sum_default = aten.sum(%x)"


def test_a_picked_output_shows_its_own_placement() -> None:
    gm, _ = captured(lambda x: x.chunk(2, -1)[1].sin(), torch.zeros(2, 4))
    (chunk,) = nodes_of(gm, torch.ops.aten.chunk.default)
    notes.set_placement(chunk, I, R)
    (picked,) = [user for user in chunk.users if user.args[1] == 1]
    assert line(picked) == f"%{picked.name} : f32[2,2] R = getitem(%chunk, 1)"


# before, Dynamo said that it exports, and Transformers then makes a mask and repeats heads
@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="this torch has another graph of the model")
def test_an_attention_block_after_the_whole_pipeline(golden: Golden) -> None:
    """Llama's, from the norm before to the residual behind it, on two ranks."""
    model, inputs = build("llama", dtype=torch.float32)
    block = rewrite(model, "ulysses", inputs, world_size=2).text("model.layers.0.self_attn")
    assert len(block.splitlines()) <= 40
    golden.check("llama_attention", after=block)
