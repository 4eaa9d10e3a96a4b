"""Constants of a machine follow from what its ranks measure; the file is one that times are read from."""

from __future__ import annotations

from pathlib import Path

import pytest

from sptransform.cli.calibrate import MEASUREMENTS, constants_of, write
from sptransform.cli.main import main
from sptransform.cli.measuring import ATTENTIONS, KINDS, MESSAGES
from sptransform.cost.hardware import Hardware, hardware_of
from sptransform.cost.times import attention_seconds, message_seconds, seconds

FLOPS, PER_SCORE, LOST, MASKED = 4e10, 1e-9, 60, 200
LATENCY, BANDWIDTH = 1e-4, 5e8
RANKS = 4


def truth() -> Hardware:
    """A machine whose figures would be these."""
    products = {"bfloat16": 8e10, "float16": 1e9, "float32": 4e10, "float64": 2e10}
    memory = {"copy": 1e10, "pointwise": 5e9, "launch": 1e-6}
    attention = {
        f"{direction}.{name}": _per_row(products_of_pair * dim, length, causal)
        for direction, products_of_pair in (("forward", 4), ("backward", 10))
        for name, length, dim, causal in ATTENTIONS
    }
    messages = {
        f"{kind}.{name}": LATENCY + size / BANDWIDTH
        for kind in KINDS
        for name, size in zip(("few", "many"), MESSAGES, strict=True)
    }
    constants = constants_of(
        products, memory, attention, messages | {"overlaps": 0.0}, num_ranks=RANKS, source="a test"
    )
    return Hardware("truth", "a machine", constants)


def _per_row(flops_of_pair: float, length: int, causal: bool) -> float:
    pairs = (length + 1) / 2 if causal else length
    hidden = 1 - pairs / length
    return (pairs + LOST + hidden * MASKED) * (flops_of_pair / FLOPS + PER_SCORE)


@pytest.mark.parametrize(("direction", "products"), [("forward", 4), ("backward", 10)])
@pytest.mark.parametrize("length", [512, 4096])
def test_attention_of_other_sizes_takes_what_it_would(direction: str, products: int, length: int) -> None:
    rows, dim = 8 * length, 96
    pairs = rows * (length + 1) // 2
    sizes = {"batch": 1, "heads": 8, "queries": length, "keys": length, "dim": dim, "value_dim": dim}
    taken = attention_seconds(products * dim * pairs, 0, direction, "float32", truth(), **sizes)
    assert taken == pytest.approx(rows * _per_row(products * dim, length, True), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_take_what_they_would(kind: str) -> None:
    for size in (1 << 12, 1 << 20, 1 << 24):
        taken = message_seconds(kind, size, RANKS, 1, truth())
        assert taken == pytest.approx(LATENCY + size / BANDWIDTH, rel=1e-6)


def test_noise_makes_no_constant_negative() -> None:
    products = dict.fromkeys(("bfloat16", "float16", "float32", "float64"), 1e10)
    memory = {"copy": 1e9, "pointwise": 5e9, "launch": 1e-6}
    attention = {f"{direction}.{name}": 1e-3 for direction in ("forward", "backward") for name, *_ in ATTENTIONS}
    messages = {f"{kind}.{name}": 1e-3 for kind in KINDS for name in ("few", "many")} | {"overlaps": 1.0}
    found = constants_of(products, memory, attention, messages, num_ranks=2, source="a test")
    numbers = {name: each.value for name, each in found.items() if isinstance(each.value, float)}
    assert all(value >= 0 for value in numbers.values()), numbers
    assert all(numbers[name] > 0 for name in numbers if name.endswith(("flops", "bandwidth")))


def test_a_file_of_it_can_be_read(tmp_path: Path) -> None:
    write(truth(), tmp_path / "here.json")
    read = hardware_of(tmp_path / "here.json")
    assert read.constants == truth().constants and read["node.ranks"] == RANKS


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--out", str(tmp_path / "here.json")]) == 0
    assert "memory.bandwidth" in capsys.readouterr().out
    from sptransform import compare
    from tests.cli.factories import build

    hardware = hardware_of(tmp_path / "here.json")
    found = compare(*build(64, 1), world_size=2, hardware=hardware)
    for option in found.runnable:
        assert option.step is not None and option.timeline is not None
        assert all(seconds(work, hardware) >= 0 for work in option.step.works)
        assert 0 < option.timeline.seconds < 60
    assert len(MEASUREMENTS) == 4
