"""Ranks share compile caches: their graphs are the same to the byte, so what one compiled the others load."""

import functools
import importlib
import os
import pkgutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

import sptransform
from sptransform.compiler import backend, caches
from sptransform.sharding.mesh import Mesh
from tests.support.gloo_pool import get_pool
from tests.support.models import MODELS, build
from tests.support.rewritten import model_for_meshes
from tests.support.tiers import tiered
from tests.support.tiny import attention_with_loss, token_inputs

pytestmark = pytest.mark.timeout(300)

WORLD_SIZES = (2, 4)
# Its logits[:, :-1] leave the last rank one token fewer: no two ranks' sizes need be the same.
UNEVEN = {"sdpa_transformer"}


@functools.cache
def graphs(name: str) -> dict[int, list[sptransform.Rewritten]]:
    """Every rank's graph, by world size."""
    meshes = [Mesh.pretended(size, rank) for size in WORLD_SIZES for rank in range(size)]
    found = model_for_meshes(name, meshes, outputs="dtensor")
    rewritten = [(x.context.mesh.size, sptransform.Rewritten(x.graph_module, x.context)) for x in found]
    return {size: [graph for own, graph in rewritten if own == size] for size in WORLD_SIZES}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", tiered([name for name in MODELS if name not in UNEVEN], quick=["llama"]))
def test_every_rank_has_the_same_graph(name: str, world_size: int) -> None:
    first, *others = graphs(name)[world_size]
    assert len(others) == world_size - 1
    for other in others:
        assert other.text() == first.text()
        assert other.graph_module.code == first.graph_module.code


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_graphs_differ_in_sizes_only(name: str, world_size: int) -> None:
    first, *others = (
        [(node.name, node.target, node.all_input_nodes) for node in graph.graph_module.graph.nodes]
        for graph in graphs(name)[world_size]
    )
    for other in others:
        assert str(other) == str(first)
    assert graphs(name)[world_size][0].text() != graphs(name)[world_size][-1].text()


def test_capturing_twice_gives_the_same_graph() -> None:
    """Of two models built alike: nothing of a process, such as an address or a counter, is in the text."""
    texts = set()
    for rank in range(2):
        torch._dynamo.reset()
        model, inputs = build("llama")
        texts.add(sptransform.rewrite(model, "ulysses", inputs, world_size=2, rank=rank).text())
    assert len(texts) == 1


def compile_in(directory: str, version: str | None = None) -> dict[str, Any]:
    """One compiled training step with its caches in `directory`: how the caches answered, and the loss."""
    torch._dynamo.reset()
    counters.clear()
    model = sptransform.parallelize(attention_with_loss().float(), "ulysses", backend="inductor")
    with (
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=directory),
        mock.patch.object(backend, "package_version", (lambda: version) if version else caches.package_version),
    ):
        loss = model(**token_inputs())
        loss.backward()
    autograd, inductor = dict(counters["aot_autograd"]), dict(counters["inductor"])
    return {"loss": float(loss.detach()), "autograd": autograd, "inductor": inductor}


def compile_by_turns(rank: int, world_size: int, directory: str) -> list[dict[str, Any]]:
    """With a cache of its own, with rank 0's, and with its own after a change to the package."""
    return [
        compile_in(f"{directory}/{rank}"),
        compile_in(f"{directory}/0"),
        compile_in(f"{directory}/{rank}", version="changed"),  # not rank 0's: the first to come would fill it
    ]


@pytest.mark.slow
@pytest.mark.inductor
def test_what_one_rank_compiled_the_others_load(tmp_path: Path) -> None:
    own, of_rank_0, changed = zip(*get_pool(2).run(compile_by_turns, str(tmp_path), timeout=280), strict=True)
    for found in own:
        assert found["autograd"].get("autograd_cache_miss") == 1, found
        assert found["inductor"].get("fxgraph_cache_miss") == 2, found
    for found in changed:
        # The key holds the package's version. The backward graph, made anew, is found by its content.
        assert found["autograd"].get("autograd_cache_miss") == 1, found
        assert found["inductor"].get("fxgraph_cache_miss", 0) >= 1, found
    for found in of_rank_0:
        assert found["autograd"].get("autograd_cache_hit") == 1, found
        assert found["inductor"].get("fxgraph_cache_hit") == 2, found
    for found in (*own, *of_rank_0, *changed):
        assert "autograd_cache_bypass" not in found["autograd"], found
        assert "fxgraph_cache_bypass" not in found["inductor"], found
        assert found["loss"] == own[0]["loss"]


def version_of(package: Path) -> str:
    return caches.package_version.__wrapped__(package)


def test_the_version_is_of_all_the_packages_files(tmp_path: Path) -> None:
    """Those behind a link as well: in a checkout, the passes."""
    package, passes = tmp_path / "package", tmp_path / "passes"
    for folder in (package / "inside", passes):
        folder.mkdir(parents=True)
    (package / "passes").symlink_to(passes)
    files = [package / "backend.py", package / "inside" / "op.py", passes / "place.py"]
    versions = [version_of(package)]
    for text in ("x = 1", "x = 2"):
        for file in files:
            file.write_text(text)
            versions.append(version_of(package))
    assert version_of(package) == versions[-1]
    files[0].rename(package / "another.py")
    versions.append(version_of(package))
    assert len(set(versions)) == len(versions)


def test_every_module_of_the_package_counts_in_its_version() -> None:
    package = Path(sptransform.__file__).parent
    names = [x.name for x in pkgutil.walk_packages([str(package)], "sptransform.")]
    modules = {Path(importlib.import_module(name).__file__).resolve() for name in names}
    assert {file.resolve() for file in caches.sources(package)} == {*modules, Path(sptransform.__file__).resolve()}
    assert any(name.startswith("sptransform.passes.") for name in names)
