"""Predicted times beside published ones: is the order of strategies right, and what does a wrong choice cost.

Each test prints a line; `pytest -s` shows them. What is asserted is what the tables of tests/data/measured gave when
the model was made; where that misses the aim of 90% of pairs and a regret of 1.05, it says so.

What is left out, and why:

- lengths below 32K of T9: launches of the measuring script, as its authors' repeated runs show;
- groups of which the fastest row takes over twice what the attention kernels alone take by their published speed: what
  they measure is mostly something else (T9a at 32K: 14% of peak). They are printed with the others, not judged.
- layouts other than zigzag, and all-to-alls of packed QKV, where a table has several: one of each is compared.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

import sptransform as sp
from sptransform.cost.hardware import HardwareLike, hardware_of
from sptransform.cost.times import seconds
from tests.cost.attention_steps import attention_seconds_of, attention_step
from tests.cost.measured import Groups, is_measured, rows, score

pytestmark = pytest.mark.slow


def report(table: str, groups: Groups, *, order: float, regret: float) -> None:
    found = score(groups)
    print(f"\n{found.line(table)}", *found.wrong, sep="\n  ")
    assert found.order >= order
    assert found.regret <= regret


def usp_groups(table: str, hardware: HardwareLike, world_size: int) -> Groups:
    """Tables of Ulysses degrees, forward iterations a second, by (g, B, S, H, D)."""
    groups = defaultdict(list)
    for row in rows(table):
        group, batch, length, heads, dim, ulysses = (int(row[name]) for name in ("g", "B", "S", "H", "D", "U"))
        if length >= 32768 and is_measured(row["zigzag_sep"]):
            sizes = (batch, heads, heads // group, length, dim)
            strategy = sp.USP(ulysses=ulysses, ring=world_size // ulysses)
            taken = attention_seconds_of(strategy, world_size, sizes, hardware, peers_merge=True)
            groups[(group, *sizes)].append((f"ulysses {ulysses}", 1 / float(row["zigzag_sep"]), taken))
    return groups


def of_kernels(groups: Groups, hardware: HardwareLike, world_size: int) -> Groups:
    """The groups whose fastest row takes at most twice what the kernels alone take."""
    kept = {}
    for key, group in groups.items():
        step = attention_step(sp.USP(ulysses=1, ring=world_size), world_size, 0, key[1:], True, True)
        kernels = sum(seconds(work, hardware_of(hardware)) for work in step.of("forward") if work.kind == "attention")
        if min(measured for _, measured, _ in group) <= 2 * kernels:
            kept[key] = group
    return kept


@pytest.mark.parametrize(("table", "hardware"), [("T9a", "a100-nvlink"), ("T9b", "l20-pcie")])
def test_ulysses_degrees(table: str, hardware: str) -> None:
    groups = usp_groups(table, hardware, 8)
    print(f"\n{score(groups).line(f'{table}, all groups')}", *score(groups).wrong, sep="\n  ")
    report(table, of_kernels(groups, hardware, 8), order=0.9, regret=1.05)


def test_gathering_keys_or_passing_them_round() -> None:
    """T1. The cards are not named; with 32 heads of 128. One of 17 pairs is wrong: 4 cards on PCIe at 8K tokens."""
    groups = {}
    for row in rows("T1"):
        hardware = {"NVLink": "a100-nvlink", "PCIe": "a100-pcie"}[row["link"]]
        for length in (2048, 8192, 32768, 65536):
            world_size, sizes = int(row["N"]), (1, 32, int(32 * float(row["f"])), length, 128)
            strategies = sp.AllGatherKV(layout="contiguous"), sp.Ring(layout="contiguous")
            gather, ring = (
                attention_seconds_of(each, world_size, sizes, hardware, causal=False, peers_merge=True)
                for each in strategies
            )
            measured = 1 - float(row[f"S{length}"]) / 100
            groups[row["link"], world_size, row["f"], length] = [
                ("gather", 1.0, 1.0),
                ("ring", measured, ring / gather),
            ]
    report("T1", groups, order=0.9, regret=1.22)


def test_ring_or_ulysses_in_a_training_step() -> None:
    """T3: heads as GLM-4.5-Air has them; the rest of the step is the same for both."""
    hardware = hardware_of("h200").replaced(attention__kernel="flash3")
    strategies = {"ulysses": sp.Ulysses(), "ring": sp.Ring()}
    groups = defaultdict(list)
    for row in rows("T3"):
        if row["style"] in strategies:
            world_size = int(row["cp"])
            taken = attention_seconds_of(
                strategies[row["style"]],
                world_size,
                (1, 96, 8, 65536, 128),
                hardware,
                passes=("forward", "forward", "backward"),
                peers_merge=True,
            )
            groups[world_size].append((row["style"], 1e6 / float(row["tok_s"]), taken))
    report("T3", groups, order=1.0, regret=1.0)


def test_64_chips_on_a_torus() -> None:
    """T5b: 32 layers of attention, computed twice forward. XLA fuses merges.

    Two of 25 pairs are wrong: at 64K tokens rings of 8 were slower than gathering and than rings of 16, by a time that
    does not grow with the tokens.
    """
    ways = {
        "all_gather": sp.AllGatherKV(),
        "ring": sp.Ring(),
        "usp 16x4": sp.USP(ring=16, ulysses=4),
        "usp 8x8": sp.USP(ring=8, ulysses=8),
        "usp 32x2": sp.USP(ring=32, ulysses=2),
    }
    groups = defaultdict(list)
    for row in rows("T5b"):
        for length in (65536, 131072, 262144):
            taken = attention_seconds_of(
                ways[row["method"]],
                64,
                (1, 32, 8, length, 128),
                "tpu-v5p",
                passes=("forward", "forward", "backward"),
                ranks=(63,),
            )
            groups[length].append((row["method"], float(row[f"S{length}"]), 32 * taken))
    report("T5b", groups, order=0.9, regret=1.16)


def test_rings_by_layout() -> None:
    """T8: seconds of rings, zigzag and not, on two cards. The kernel is FlashAttention-2."""
    groups = defaultdict(list)
    for row in rows("T8"):
        hardware = {"H800": "h800", "A100": "a100-nvlink"}[row["hw"]]
        passes = ("forward",) if row["pass"] == "fwd" else ("forward", "backward")
        if row["api"] == "batch":
            for column, layout in (("ring", "contiguous"), ("zigzag", "zigzag")):
                taken = attention_seconds_of(
                    sp.Ring(layout),
                    8,
                    (1, 32, 8, 65536, 128),
                    hardware_of(hardware).replaced(attention__kernel="flash2"),
                    passes=passes,
                    peers_merge=True,
                )
                groups[row["hw"], row["pass"]].append((column, 1 / float(row[column]), taken))
    report("T8", groups, order=1.0, regret=1.0)
    assert score(groups).error < 0.15


def test_long_context_attention_on_one_node_and_two() -> None:
    """T11: TFLOP/s a GPU, forward and backward, of the ways that several libraries share."""
    card = {"H100": hardware_of("h100-ib").replaced(attention__kernel="flash3"), "B200": hardware_of("b200")}
    ways = {"ulysses": sp.Ulysses(), "ring_p2p": sp.Ring(), "ring_allgather": sp.AllGatherKV()}
    groups = defaultdict(list)
    for row in rows("T11"):
        for ranks in (8,) if row["hw"] == "B200" else (8, 16):
            strategy = ways.get(row["method"], sp.USP(ulysses=8 if ranks > 8 else 4, ring=2))
            if row["mask"] not in ("causal", "full") or row["method"] not in (*ways, "usp"):
                continue
            length = (8192 if row["hw"] == "H100" else 16384) * ranks
            causal, direction = row["mask"] == "causal", {"fwd": "forward", "bwd": "backward"}[row["pass"]]
            taken = attention_seconds_of(
                strategy,
                ranks,
                (1, 64, 8, length, 128),
                card[row["hw"]],
                causal=causal,
                passes=(direction,),
                peers_merge=True,
                ranks=(ranks - 1,),
            )
            flops = 4 * 64 * 128 * length**2 / (2 if causal else 1) * (1 if direction == "forward" else 2.5)
            measured = flops / ranks / float(row[f"cp{ranks}"]) / 1e12
            groups[row["hw"], row["mask"], row["pass"], ranks].append((row["method"], measured, taken))
    report("T11", groups, order=0.9, regret=1.05)
