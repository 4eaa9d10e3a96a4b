"""Predicted times beside published ones: is the order of strategies right, and what does a wrong choice cost.

Each test prints a line; `pytest -s` shows them. What is asserted is what the tables of tests/data/measured gave when
the model was made; where that misses the aim of 90% of pairs and a regret of 1.05, it says so.

What is left out, and why:

- lengths below 32K of T9: launches of the measuring script, as its authors' repeated runs show;
- layouts other than zigzag, where a table has several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import geometric_mean

import pytest

import sptransform as sp
from sptransform.cost.hardware import HardwareLike, hardware_of
from tests.cost.attention_steps import attention_seconds_of
from tests.cost.measured import Groups, is_measured, rows, score

pytestmark = pytest.mark.slow


def report(table: str, groups: Groups, *, order: float, regret: float) -> None:
    found = score(groups)
    print(f"\n{found.line(table)}", *found.wrong, sep="\n  ")
    assert found.order >= order
    assert found.regret <= regret


def usp_groups(table: str, hardware: HardwareLike, world_size: int, columns: tuple[str, ...]) -> Groups:
    """Tables of Ulysses degrees, forward iterations a second, by (g, B, S, H, D); of several columns their mean."""
    groups = defaultdict(list)
    for row in rows(table):
        group, batch, length, heads, dim, ulysses = (int(row[name]) for name in ("g", "B", "S", "H", "D", "U"))
        found = [float(row[column]) for column in columns if is_measured(row[column])]
        if length >= 32768:
            sizes = (batch, heads, heads // group, length, dim)
            taken = attention_seconds_of(usp(row, world_size), world_size, sizes, hardware, peers_merge=True)
            groups[(group, *sizes)].append((f"ulysses {ulysses}", 1 / geometric_mean(found), taken))
    return groups


@pytest.mark.parametrize(("table", "hardware"), [("T9a", "a100-nvlink"), ("T9b", "l20-pcie")])
def test_ulysses_degrees(table: str, hardware: str) -> None:
    """T9. Queries, keys and values go in one all-to-all or in three: two columns, of which the mean is judged.

    Without an all-to-all, of Ulysses degree 1, both columns time one program; of T9a they differ by 2 to 28%.
    """
    print(f"\n{score(usp_groups(table, hardware, 8, ('zigzag_sep',))).line(f'{table}, three all-to-alls')}")
    report(table, usp_groups(table, hardware, 8, ("zigzag_sep", "zigzag_pack")), order=0.9, regret=1.05)


def test_gathering_keys_or_passing_them_round() -> None:
    """T1. The cards are not named; with 32 heads of 128. One of 17 pairs is wrong: 4 cards on PCIe at 8K tokens.

    Rings of grouped heads were mended in that library on the day of the table (vllm-omni #5255). If its ring passed
    keys and values of all heads round, all pairs would be right; nothing says so, and it is not assumed.
    """
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


@pytest.mark.parametrize(
    ("table", "layout", "order", "regret"), [("T5b", "zigzag", 0.9, 1.16), ("T5c", "contiguous", 0.8, 1.1)]
)
def test_64_chips_on_a_torus(table: str, layout: str, order: float, regret: float) -> None:
    """T5: 32 layers of attention, computed twice forward. XLA fuses merges. T5c was found when all was done.

    At 64K tokens both tables have rings of 8 slower than rings of 16, by a time that does not grow with the tokens: it
    is not attention's. Such a mesh splits axes of the torus, over which parameters are gathered too.
    """
    ways = {
        "all_gather": sp.AllGatherKV(layout),
        "ring": sp.Ring(layout),
        **{f"usp {r}x{64 // r}": sp.USP(ring=r, ulysses=64 // r, layout=layout) for r in (8, 16, 32)},
    }
    groups = defaultdict(list)
    for row in rows(table):
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
    report(table, groups, order=order, regret=regret)


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


def test_tables_that_were_not_looked_at() -> None:
    """T9c, T9d: Ulysses degrees on 4 cards on PCIe and on 8 on NVLink, that nothing was chosen by."""
    groups = defaultdict(list)
    for row in rows("T9c"):
        if row["S"] == "65536":  # shorter ones are noise, as their repeats show
            sizes = (2, 32, 32, 65536, 32)
            taken = attention_seconds_of(usp(row, 4), 4, sizes, "a100-pcie", peers_merge=True)
            groups["T9c"].append((f"ulysses {row['U']}", 1 / float(row["zigzag_sep"]), taken))
    for row in rows("T9d"):
        for column, passes in (("fwd", ("forward",)), ("fwd_bwd", ("forward", "backward"))):
            sizes = (2, 64, 8, 8 * int(row["S_local"]), 128)
            taken = attention_seconds_of(usp(row, 8), 8, sizes, "a100-nvlink", passes=passes, peers_merge=True)
            groups["T9d", column].append((f"ulysses {row['U']}", 1 / float(row[column]), taken))
    report("T9c, T9d", groups, order=1.0, regret=1.02)


def usp(row: Mapping[str, str], world_size: int) -> sp.USP:
    return sp.USP(ulysses=int(row["U"]), ring=world_size // int(row["U"]))


def test_ulysses_or_a_ring_on_four_cards() -> None:
    """T9e: of the 4090, after this table, all-to-alls were no longer taken to share a link (no peer-to-peer).

    On it no message seems to be hidden beside kernels, and on H800 Ulysses is slower with longer sequences: 2 of 6 are
    wrong.
    """
    groups = {}
    for row in rows("T9e"):
        sizes, card = (int(row["B"]), 40, 40, int(row["S"]), 128), row["hw"][2:].split()[0].lower()
        ways = {"usp_2x2_ms": sp.USP(ulysses=2, ring=2), "ulysses4_ms": sp.Ulysses()}
        hardware = {"4090": "4090-pcie", "h800": "h800"}[card]
        groups[tuple(row.values())] = [
            (
                name,
                float(row[name]) / 1e3,
                attention_seconds_of(way, 4, sizes, hardware, causal=False, peers_merge=True),
            )
            for name, way in ways.items()
        ]
    report("T9e", groups, order=0.66, regret=1.17)
