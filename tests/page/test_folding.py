"""Equal layers are one segment, if they are equal in every graph; names do not tell layers apart."""

from dataclasses import replace

import pytest

from sptransform.graph.listing import Line
from sptransform.page.folding import Key, by_layer, inside, layer_of, segments, within_layer


def layer(index: int, *, op: str = "aten.relu", reads: str = "x") -> list[Line]:
    """Two nodes of ``net.<index>``, the first of which reads ``reads`` and a parameter of the layer."""
    path = f"net.{index}"
    first, second = f"linear_{index}", f"relu_{index}"
    return [
        Line(first, f"{path}.proj", "m.py:1: x", "f32[2]", f"aten.linear(%{reads}, %{path}.proj.weight)", "op"),
        Line(second, path, "m.py:2: y", "f32[2]", f"{op}(%{first})", "op"),
    ]


def outside(name: str) -> Line:
    return Line(name, "", None, "f32[2]", "aten.add(%x, %x)", "op")


def titles(*graphs: list[Line], copies: dict[tuple[str, int], int] | None = None) -> list[tuple[str, int]]:
    return [(each.title, each.times) for each in segments([by_layer(graph) for graph in graphs], copies or {})]


CHAIN = [outside("a"), *layer(0), *layer(1, reads="relu_0"), *layer(2, reads="relu_1"), outside("b")]


def test_equal_layers_are_one() -> None:
    assert titles(CHAIN) == [("before net", 1), ("net.0..2", 3), ("after net", 1)]


def test_a_layer_that_differs_in_one_graph_stands_alone_in_all() -> None:
    other = [*layer(0), *layer(1, op="aten.gelu", reads="relu_0"), *layer(2, reads="relu_1")]
    assert titles(CHAIN, other) == [("before net", 1), ("net.0", 1), ("net.1", 1), ("net.2", 1), ("after net", 1)]


def test_layers_that_wire_alike_lines_differently_are_told_apart() -> None:
    crossed = layer(1, reads="relu_0")
    crossed[1] = replace(crossed[1], call="aten.relu(%relu_0)")
    assert titles([*layer(0), *crossed]) == [("net.0", 1), ("net.1", 1)]


def test_a_layer_of_a_short_graph_stands_for_several() -> None:
    graph = [*layer(0), *layer(1, reads="relu_0"), *layer(31, reads="relu_1")]
    assert titles(graph, copies={("net", 1): 30}) == [("net.0..31", 32)]


def test_a_layer_that_stands_for_others_is_the_first_of_them() -> None:
    first = layer(0, op="aten.gelu")
    last = layer(31, op="aten.gelu")
    found = titles([*first, *layer(1), *last], copies={("net", 1): 30})
    assert found == [("net.0", 1), ("net.1..30", 30), ("net.31", 1)]


def test_layers_of_two_kinds_that_alternate() -> None:
    graph = [line for i in (0, 2, 30) for line in (*layer(i), *layer(i + 1, op="aten.gelu"))]
    found = titles(graph, copies={("net", 2): 14, ("net", 3): 14})
    ends = [[(f"net.{i}", 1), (f"net.{i + 1}", 1)] for i in (0, 30)]
    assert found == [*ends[0], ("net.2,4..28", 14), ("net.3,5..29", 14), *ends[1]]


def test_paths() -> None:
    assert layer_of("model.layers.3.self_attn") == ("model.layers", 3) and layer_of("3") == ("", 3)
    assert layer_of("model.norm") is None
    assert inside("model.layers.3.self_attn") == "self_attn" and inside("model.layers.3") == ""
    assert inside("0.1") == "1"


def test_own_parameters_are_named_within_the_layer() -> None:
    (line, _) = layer(1)
    assert within_layer(line).call == "aten.linear(%x, %proj.weight)"
    assert "%net.0.proj.weight" in within_layer(replace(line, call="aten.linear(%x, %net.0.proj.weight)")).call


@pytest.mark.parametrize("paths", [["enc.0", "enc.1", "dec.0"], ["0", "1", "2"]])
def test_kinds_of_layers_follow_each_other(paths: list[str]) -> None:
    lines = [Line(f"n{i}", path, None, "f32[2]", "aten.relu(%x)", "op") for i, path in enumerate(paths)]
    keys = [key for segment in segments([by_layer(lines)]) for key in segment.keys]
    assert [f"{key.prefix}.{key.index}".lstrip(".") for key in keys if key.prefix or "0" in paths] == paths
    assert keys == sorted(keys) and all(isinstance(key, Key) for key in keys)
