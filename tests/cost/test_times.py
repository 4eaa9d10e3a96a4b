"""The formulas of times give back the micro-benchmarks that their constants come from, and take sympy sizes."""

from __future__ import annotations

import pytest
import sympy

from sptransform.cost.hardware import Hardware, hardware_names, hardware_of
from sptransform.cost.records import Message, Work
from sptransform.cost.times import attention_seconds, matmul_seconds, memory_seconds, message_seconds, seconds
from sptransform.diagnostics.errors import UsageError

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# FlashAttention-3 paper (arXiv 2407.08608), Figures 5 and 6: TFLOP/s on H100 at LENGTHS, 16K tokens in all
KERNELS = {
    ("flash2", "forward", 64, False): (282, 306, 318, 321, 322, 324),
    ("flash2", "forward", 128, False): (309, 350, 362, 368, 370, 370),
    ("flash2", "forward", 64, True): (180, 229, 262, 284, 295, 299),
    ("flash2", "forward", 128, True): (191, 260, 298, 319, 333, 335),
    ("flash2", "backward", 64, False): (198, 238, 264, 279, 287, 291),
    ("flash2", "backward", 128, False): (214, 260, 291, 310, 318, 322),
    ("flash3", "forward", 64, False): (333, 392, 460, 476, 496, 497),
    ("flash3", "forward", 128, False): (467, 565, 625, 638, 646, 648),
    ("flash3", "forward", 256, False): (482, 639, 707, 736, 746, 756),
    ("flash3", "forward", 64, True): (197, 265, 371, 420, 460, 473),
    ("flash3", "forward", 128, True): (292, 423, 521, 579, 602, 616),
    ("flash3", "backward", 64, False): (272, 363, 422, 453, 472, 474),
    ("flash3", "backward", 128, False): (316, 424, 501, 542, 559, 561),
    ("cudnn", "forward", 64, True): (225, 288, 334, 363, 379, 388),
    ("cudnn", "forward", 128, True): (315, 410, 484, 518, 529, 539),
    ("cudnn", "backward", 128, False): (305, 408, 465, 499, 518, 516),
}


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_attention_kernels_as_published(case: tuple[str, str, int, bool]) -> None:
    kernel, direction, dim, causal = case
    hardware = hardware_of("h100-nvlink").replaced(attention__kernel=kernel)
    for length, published in zip(LENGTHS, KERNELS[case], strict=True):
        batch, heads = 16384 // length, 2048 // dim
        flops = 4 * batch * heads * dim * length**2 // (2 if causal else 1)
        flops = flops if direction == "forward" else flops * 5 // 2
        sizes = {"batch": batch, "heads": heads, "queries": length, "keys": length, "dim": dim, "value_dim": dim}
        taken = attention_seconds(flops, 8 * 16384 * 2048, direction, "bfloat16", hardware, **sizes)
        close = 0.1 if length >= 4096 else 0.3
        assert flops / taken / 1e12 == pytest.approx(published, rel=close), length


# vidur, send_recv.csv of two DGX: (hardware, nodes, bytes, seconds)
HOPS = [
    ("h100-ib", 1, 100352, 9e-6),
    ("h100-ib", 1, 542720, 9e-6),
    ("h100-ib", 1, 55050240, 160e-6),
    ("h100-ib", 2, 2048, 17e-6),
    ("h100-ib", 2, 264192, 27e-6),
    ("h100-ib", 2, 2064384, 93e-6),
    ("h100-ib", 2, 2097152, 71e-6),
    ("h100-ib", 2, 67108864, 1871e-6),
    ("a100-nvlink", 1, 67108864, 294e-6),
]


@pytest.mark.parametrize("case", HOPS, ids=str)
def test_messages_to_a_neighbour_as_published(case: tuple[str, int, int, float]) -> None:
    name, nodes, size, published = case
    assert message_seconds("send_recv", size, 2, nodes, hardware_of(name)) == pytest.approx(published, rel=0.3)


# autoparallel, nccl_cost_model.py: (kind, ranks, nodes, GB/s of the larger side, latency)
COLLECTIVES = [
    ("all_gather", 8, 1, 394e9, 30e-6),
    ("reduce_scatter", 8, 1, 394e9, 30e-6),
    ("all_reduce", 8, 1, 267e9, 31e-6),
    ("all_gather", 16, 2, 409.6e9, 70e-6),
    ("all_gather", 64, 8, 390.1e9, 296.8e-6),
    ("all_gather", 8, 8, 54.9e9, 106.4e-6),
]


@pytest.mark.parametrize("case", COLLECTIVES, ids=str)
def test_collectives_as_published(case: tuple[str, int, int, float, float]) -> None:
    kind, ranks, nodes, bandwidth, latency = case
    share = (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)
    hardware = hardware_of("h100-ib")
    assert message_seconds(kind, 0, ranks, nodes, hardware) == pytest.approx(latency, rel=0.2)
    assert message_seconds(kind, 1e12 * share, ranks, nodes, hardware) == pytest.approx(1e12 / bandwidth, rel=0.25)


def test_an_all_to_all_shares_the_links_of_a_host() -> None:
    def bandwidth(name: str, ranks: int) -> float:
        return 1e12 / message_seconds("all_to_all", 1e12, ranks, 1, hardware_of(name))

    assert bandwidth("l20-pcie", 8) == pytest.approx(bandwidth("l20-pcie", 4) * 3 / 7, rel=1e-3)
    assert bandwidth("h100-nvlink", 8) == pytest.approx(bandwidth("h100-nvlink", 4), rel=1e-3)


def test_short_blocks_are_slower_for_the_same_pairs() -> None:
    def taken(queries: int, keys: int) -> float:
        flops = 4 * 32 * queries * keys * 128
        sizes = {"batch": 1, "heads": 32, "queries": queries, "keys": keys, "dim": 128, "value_dim": 128}
        return attention_seconds(flops, 0, "forward", "bfloat16", hardware_of("h100-nvlink"), **sizes)

    assert 8 * taken(8192, 1024) > 1.05 * taken(8192, 8192)
    assert taken(16, 8192) > 0.9 * taken(128, 8192) / 8  # too few queries for all processors


def test_a_gradient_is_told_by_its_op() -> None:
    work = Work(
        "a",
        "aten._scaled_dot_product_flash_attention_backward",
        "attention",
        "backward",
        "",
        dtype="bfloat16",
        flops=10 * 8 * 4096**2 * 64,
        sizes={"batch": 1, "heads": 8, "key_heads": 8, "queries": 4096, "keys": 4096, "dim": 64, "value_dim": 64},
    )
    hardware = hardware_of("h100-nvlink")
    given = {name: size for name, size in work.sizes.items() if name != "key_heads"}
    assert seconds(work, hardware) == attention_seconds(work.flops, 0, "backward", "bfloat16", hardware, **given)


@pytest.mark.parametrize("name", hardware_names())
def test_every_file_has_what_the_formulas_read(name: str) -> None:
    hardware = hardware_of(name)
    assert all(0 < taken < 60 for taken in by_sizes(hardware, 2**16, 4, 1))
    sizes = {"batch": 1, "heads": 8, "queries": 4096, "keys": 4096, "dim": 64, "value_dim": 64}
    assert 0 < attention_seconds(10**12, 10**6, "backward", "float32", hardware, **sizes) < 60
    assert all(message_seconds(kind, 10**6, 4, 1, hardware) < 60 for kind in ("all_reduce", "reduce_scatter"))
    assert hardware["memory.bytes"] > 1e9


def test_waits_take_no_time_of_their_own() -> None:
    message = Message("all_gather", 10**6, (0, 1))
    assert seconds(Work("w", "wait", "wait", "forward", "", message=message), hardware_of("h100-nvlink")) == 0


def test_no_link_between_nodes() -> None:
    work = Work("m", "send", "message", "forward", "", message=Message("all_gather", 1, tuple(range(16))))
    with pytest.raises(UsageError, match=r"h100-nvlink has no links between nodes\n.*2 nodes of 8"):
        seconds(work, hardware_of("h100-nvlink"))


def by_sizes(hardware: Hardware, tokens: object, ranks: object, nodes: object) -> list[object]:
    """Each formula once, of a sequence that ranks share."""
    rows = tokens / ranks  # type: ignore[operator]
    sizes = {"batch": 1, "heads": 32, "queries": rows, "keys": tokens, "dim": 128, "value_dim": 128}
    return [
        memory_seconds(rows * 4096 * 4, hardware),
        matmul_seconds(2 * rows * 4096 * 4096, rows * 4096 * 4, "bfloat16", hardware),
        attention_seconds(4 * rows * tokens * 4096 / 2, rows * 8192, "forward", "bfloat16", hardware, **sizes),
        *(message_seconds(kind, rows * 8192, ranks, nodes, hardware) for kind in ("send_recv", "all_to_all")),
        message_seconds("all_gather", tokens * 1024, ranks, nodes, hardware),
    ]


@pytest.mark.parametrize("ranks", [8, 64])
def test_the_formulas_take_sympy_sizes(ranks: int) -> None:
    hardware = hardware_of("h100-ib")
    symbols = sympy.symbols("S N M", positive=True)
    formulas = by_sizes(hardware, *symbols)
    numbers = by_sizes(hardware, 2**20, ranks, ranks // 8)
    evaluated = [sympy.lambdify(symbols, formula)(2**20, ranks, ranks // 8) for formula in formulas]
    assert evaluated == pytest.approx(numbers, rel=1e-9)
    assert all(sympy.jscode(formula) for formula in formulas)
