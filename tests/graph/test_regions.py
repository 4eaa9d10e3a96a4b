"""Regions of a graph against what is in force when it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from sptransform.graph import notes
from sptransform.graph.edit import emit_like
from sptransform.graph.regions import Region
from tests.passes.blocks import heads
from tests.support.graphs import captured, nodes_of

aten = torch.ops.aten
State = tuple[bool, bool, torch.dtype]

# nested lists of region names; None is a place to look at
regions = st.recursive(
    st.none(), lambda inside: st.tuples(st.sampled_from(["no_grad", "enable_grad", "half", "off"]), st.lists(inside))
)


def in_force() -> State:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def build(graph: fx.Graph, tree: object, grad_enabled: bool = True) -> None:
    """The nodes that eager code with such regions leaves in a graph: grad mode is set, and set back to what it was."""
    if tree is None:
        graph.call_function(in_force)
        return
    name, inside = tree
    if name.endswith("grad"):
        graph.call_function(torch._C._set_grad_enabled, (name == "enable_grad",))
        for each in inside:
            build(graph, each, name == "enable_grad")
        graph.call_function(torch._C._set_grad_enabled, (grad_enabled,))
    else:
        entered = graph.call_function(
            torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, name == "half", False)
        )
        for each in inside:
            build(graph, each, grad_enabled)
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))


@given(st.lists(regions, max_size=4))
def test_a_region_is_what_is_in_force_when_the_graph_runs(trees: list[object]) -> None:
    graph = fx.Graph()
    graph.placeholder("x")
    for tree in (None, *trees, None):
        build(graph, tree)
    looks = graph.find_nodes(op="call_function", target=in_force)
    graph.output(looks)
    seen = fx.Interpreter(fx.GraphModule({}, graph)).run(None)
    places = notes.outermost(graph)
    for node, state in zip(looks, seen, strict=True):
        region = notes.region_of(node)
        with torch.set_grad_enabled(region.grad_enabled), region.autocast():
            assert in_force() == state
        assert notes.region_of(places[node]) == Region()
        assert (places[node] is node) == (region == Region())
    assert places[looks[-1]] is looks[-1]


def nested(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = x.sin()
        with torch.no_grad():
            scale = scale.cos()
        scale = scale.tan()
    return x * scale


def test_of_nested_regions_without_gradients_all_end() -> None:
    gm, _ = captured(nested, heads())
    (mul,) = nodes_of(gm, aten.mul.Tensor)
    assert notes.region_of(mul) == Region()
    for target in (aten.sin.default, aten.cos.default, aten.tan.default):
        (node,) = nodes_of(gm, target)
        assert notes.region_of(node) == Region(grad_enabled=False)


def test_every_node_is_looked_at_once_however_many_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(20):
                x = x.sin()
        return x

    gm, _ = captured(model, heads())
    looks = 0

    def counted(self: Region, node: fx.Node, after: Callable[[Region, fx.Node], Region] = Region.after) -> Region:
        nonlocal looks
        looks += 1
        return after(self, node)

    monkeypatch.setattr(Region, "after", counted)
    sines = nodes_of(gm, aten.sin.default)
    for node in sines:
        for _ in range(5):
            added = emit_like(node, aten.cos.default, node.args[0])
            assert notes.region_of(added) == notes.region_of(node)
    assert looks < len(gm.graph.nodes)


def test_a_copy_of_a_node_elsewhere_is_in_the_region_it_stands_in() -> None:
    gm, _ = captured(nested, heads())
    (sin,), (mul,) = nodes_of(gm, aten.sin.default), nodes_of(gm, aten.mul.Tensor)
    assert notes.region_of(sin) != Region()
    with gm.graph.inserting_before(mul):
        again = gm.graph.call_function(aten.sin.default, sin.args)
    notes.fork(sin, again)
    assert notes.region_of(again) == Region()
