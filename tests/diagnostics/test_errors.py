"""Messages have one form: what is wrong, where, what was found, what would fix it. Others stand beside their passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sptransform
from sptransform.compiler.options import Options
from sptransform.diagnostics import errors
from sptransform.diagnostics.errors import SPTransformError, UsageError, describe
from sptransform.planning.auto import Auto
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.names import strategy_of
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP
from tests.support.golden import FOLDER, Golden
from tests.support.graphs import captured, nodes_of

MISTAKES: dict[str, Callable[[], Any]] = {
    "backend": lambda: Options(backend="gcc"),
    "mesh_type": lambda: Ulysses().mesh_of("sp"),
    "no_process_group": lambda: sptransform.parallelize(nn.Linear(2, 2), "ulysses"),
    "not_a_module": lambda: sptransform.parallelize(torch.sin, "ulysses"),
    "option": lambda: Options.of({"strategie": "ulysses"}),
    "outputs": lambda: Options(outputs="sharded"),
    "own_backend": lambda: Options(backend="sptransform"),
    "rank": lambda: Mesh.pretended(4, 4),
    "sequence_dims": lambda: Options(sequence_dims={"x": "1"}),
    "split": lambda: Ulysses(split="tokens"),
    "strategy_memory": lambda: Auto(memory=0),
    "strategy_type": lambda: strategy_of(Ulysses),
    "strategy_unknown": lambda: strategy_of("ulises"),
    "usp_layout": lambda: USP(layout="snaked"),
    "usp_ranks": lambda: USP(ulysses=3).mesh_shapes(4, (4,)),
    "usp_ranks_of_two_dims": lambda: USP(ulysses=2, ring=4).mesh_shapes(8, (2, 4)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_usage_errors(golden: Golden, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        MISTAKES[name]()
    message = str(caught.value)
    if name.endswith("backend"):  # which backends there are depends on what is installed
        message = message.split("\n  fix: one of ")[0] + "\n  fix: one of ..."
    golden.check(f"errors_usage_{name}", message=message)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AllGatherKV("Zigzag"),
        lambda: AllGatherKV(regather=None),
        lambda: Ring(["zigzag"]),
        lambda: Ring(kv=True),
        lambda: Ulysses(split=None),
        lambda: USP(True),
        lambda: USP(2.0),
        lambda: USP(-1),
        lambda: USP(ring=0),
    ],
)
def test_other_wrong_options_of_strategies(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=r"\n  found: \w+=.*\n  fix: "):
        make()


@pytest.mark.parametrize("name", ["allgather", "auto", "ring", "ulysses", "usp"])
def test_strategies_by_name(name: str) -> None:
    classes = {"allgather": AllGatherKV, "auto": Auto, "ring": Ring, "ulysses": Ulysses, "usp": USP}
    assert strategy_of(name) == classes[name]()


def test_every_message_has_the_one_form() -> None:
    files = sorted(FOLDER.glob("errors_*.txt"))
    assert len(files) > 15
    for file in files:
        title, first, *rest = file.read_text().rstrip().splitlines()
        assert title == "## message"
        assert first[0] != " " and not first.endswith("."), file.name
        labels = [line.split(":")[0] for line in rest]
        order = ["  at", "  in", "  found", "  fix"]
        assert labels == sorted(labels, key=order.index), file.name


def test_users_mistakes_say_what_would_fix_them() -> None:
    for file in FOLDER.glob("errors_usage_*.txt"):
        if file.stem != "errors_usage_rank":
            assert "\n  fix: " in file.read_text(), file.name


def test_describe() -> None:
    gm, _ = captured(lambda x: x.sin(), torch.zeros(2))
    (node,) = nodes_of(gm, torch.ops.aten.sin.default)
    what, at, where, found, fix = describe("it is wrong", node=node, found="this", fix="that").splitlines()
    assert what == "it is wrong"
    assert at == "  at: %sin = aten.sin.default"
    assert where.startswith("  in: ") and where.endswith("captured(lambda x: x.sin(), torch.zeros(2))")
    assert (found, fix) == ("  found: this", "  fix: that")
    assert describe("it is wrong") == "it is wrong"


def test_the_family() -> None:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and name.endswith("Error"):
            assert issubclass(kind, SPTransformError), name
            assert kind.__doc__, name
    assert issubclass(UsageError, ValueError)
