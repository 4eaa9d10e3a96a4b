"""The page in headless Chromium: no errors, sliders that compute what Python does, search, themes, narrow windows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from sptransform.cost.formulas import B, N, S
from sptransform.cost.hardware import hardware_of
from tests.page.shown import comparison, comparison_with_times

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=5000"),
)

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a function's body on the page and returns what it returns; the console must stay empty."""
    folder = tmp_path_factory.mktemp("browser")
    comparison_with_times().html(folder / "page.html")
    text = (folder / "page.html").read_text(encoding="utf-8")

    def run(body: str, width: int = 1280, *flags: str) -> Any:
        script = f"""<script>
            const result = document.createElement("pre");
            result.id = "result";
            result.textContent = JSON.stringify((() => {{ {body} }})());
            document.body.append(result);
        </script></body>"""
        (folder / "driven.html").write_text(text.replace("</body>", script), encoding="utf-8")
        profile = tmp_path_factory.mktemp("profile")
        window = f"--window-size={width},900"
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", window, "--dump-dom"]
        done = subprocess.run(
            [*command, (folder / "driven.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not console, console
        return json.loads(unescape(re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)[1]))

    return run


def test_sliders_are_python(run: Run) -> None:
    """At all stops of N and some of S and B, in the table as a reader sees it."""
    found = run(
        """
        const stops = JSON.parse(document.getElementById("data").textContent).sliders, rows = [];
        const set = (id, at) => {
          const slider = document.getElementById(id);
          slider.value = at;
          slider.dispatchEvent(new Event("input"));
        };
        for (const name of [...stops.names, "step time"]) {
          const select = document.getElementById("count");
          select.value = name;
          select.dispatchEvent(new Event("change"));
          for (let n = 0; n < stops.N.length; n++) for (const s of [0, 5, stops.S.length - 1]) for (const b of [0, 3]) {
            set("N", n); set("S", s); set("B", b);
            const at = [stops.S[s], stops.B[b], stops.N[n]];
            for (const row of document.querySelectorAll("#formula-table tbody tr"))
              rows.push([name, row.children[0].textContent, ...at, row.children[1].querySelector(".n")?.title ?? null]);
          }
        }
        return rows;
        """
    )
    options = {option.name: option for option in comparison_with_times().runnable}
    assert len(found) == 3 * 3 * 6 * len(options)
    hardware, held = hardware_of("h100-nvlink"), Counter()
    for name, strategy, s, b, n, shown in found:
        option = options[strategy.removesuffix(" 8")]
        assert strategy.endswith(" 8") == (n == 8), "it is called what it is on so many ranks"
        if name == "step time":
            value = option.times.seconds(s, b, n, hardware)
            if s == 64 and b == 1 and n == 4:
                value = float(f"{option.timeline.seconds:.6g}")
            assert (shown is None) == (value is None), (strategy, s, b, n)
            assert shown is None or float(shown.removesuffix(" s, simulated")) == pytest.approx(value, rel=1e-12)
        else:
            value = int(option.formulas[name].value({S: s, B: b, N: n})) if s % 32 == 0 else None
            # beyond 2^53 a number of JavaScript has fewer digits
            large = shown is not None and "e+" in shown
            assert large == (value is not None and value >= 2**53)
            if large:
                assert float(shown.removesuffix(", counted")) == pytest.approx(value, rel=1e-14)
            else:
                assert shown == (None if value is None else f"{value:,}, counted"), (name, strategy, s, b, n)
        held[name] += value is not None
    assert 0 < held["step time"] < held["forward bytes"] == held["forward FLOPs"] == 3 * 6 * len(options)


def test_no_time_is_shown_where_messages_run_beside_kernels(run: Run) -> None:
    """On PCIe a step's time is no sum: at the page's own sizes it is simulated, elsewhere there is a dash."""
    shown = run(
        """
        const texts = [], say = (id, value, event) => {
          const node = document.getElementById(id);
          node.value = value;
          node.dispatchEvent(new Event(event));
        };
        say("count", "step time", "change");
        for (const machine of ["h100-nvlink", "l20-pcie"]) for (const s of [0, 5]) {
          say("machine", machine, "change");
          say("S", s, "input");
          texts.push([...document.querySelectorAll("#formula-table tbody td")].map((cell) => cell.textContent));
        }
        return texts;
        """
    )
    own, elsewhere, of_pcie, of_pcie_elsewhere = shown
    assert all(text.endswith("s") for text in (*own, *elsewhere, *of_pcie)) and own != elsewhere
    assert set(of_pcie_elsewhere) == {"–"}


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_wider_than_the_window(run: Run, width: int) -> None:
    wide, sections = run(
        """
        const root = document.documentElement, sections = [...document.querySelectorAll("main section")];
        const sizes = sections.map((x) => [x.id, x.getBoundingClientRect().height, x.innerText.length]);
        return [root.scrollWidth - root.clientWidth, sizes];
        """,
        width,
    )
    assert wide <= 0
    assert [name for name, *_ in sections] == [
        *("side-by-side", "layers", "graph", "tensors", "rings", "memory", "time", "what-if")
    ]
    assert all(height > 100 and length > 80 for _, height, length in sections), sections


def test_search_leads_to_a_line(run: Run) -> None:
    found = run(
        """
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "/" }));
        const input = document.activeElement;
        input.value = "all_to_all layers";
        input.dispatchEvent(new Event("input"));
        const first = document.querySelector("#found li").textContent;
        input.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
        return [input.id, first, document.activeElement.textContent, document.getElementById("source").textContent];
        """
    )
    assert found[0] == "find" and "all_to_all" in found[1] and "sptransform.all_to_all" in found[2]
    assert re.match(r"\S+shown\.py:\d+\s+attended = functional\.scaled_dot_product_attention", found[3]), found[3]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_in_both_themes(run: Run, theme: str) -> None:
    """Contrast of all text with its background, as WCAG 2.1 counts it (success criterion 1.4.3)."""
    worst = run(
        f"""
        document.documentElement.dataset.theme = "{theme}";
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const linear = (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
        const behind = (node) => {{
          for (; node; node = node.parentElement) {{
            const own = parse(getComputedStyle(node).backgroundColor);
            if (own.length < 4 || own[3] > 0) return own;
          }}
          return [255, 255, 255];
        }};
        const found = [];
        for (const node of document.querySelectorAll("body *:not(script):not(style):not(svg *)")) {{
          const own = [...node.childNodes].some((x) => x.nodeType === 3 && x.textContent.trim());
          if (!own || !node.getClientRects().length) continue;
          const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
          found.push([(a + 0.05) / (b + 0.05), node.tagName + "." + node.className, node.textContent.slice(0, 30)]);
        }}
        return found.sort((x, y) => x[0] - y[0])[0];
        """
    )
    assert worst[0] >= 4.5, worst


def test_options_and_layouts_can_be_chosen(run: Run) -> None:
    heads, lanes, themes = run(
        """
        const heads = () => [...document.querySelectorAll("#lines thead th")].map((x) => x.textContent);
        const before = heads();
        document.querySelectorAll(".pick")[0].click();
        const after = heads(), lanes = [];
        for (const button of document.querySelectorAll("#layout button")) {
          button.click();
          const says = document.getElementById("ring-says").textContent;
          lanes.push([button.textContent, document.querySelectorAll("#lanes rect title").length, says]);
        }
        const theme = () => getComputedStyle(document.documentElement).colorScheme;
        const themes = [theme()];
        for (let i = 0; i < 2; i++) { document.getElementById("theme").click(); themes.push(theme()); }
        return [[before, after], lanes, themes];
        """
    )
    assert heads[0][0] == "before" and set(heads[1]) == {*heads[0]} - {comparison().options[0].name}
    assert [name for name, *_ in lanes] == ["zigzag", "contiguous", "striped"]
    assert lanes[0][1] == 16 and lanes[1][1] == 10, "ranks attend to no keys of later ranks"
    assert "+0.0%" in lanes[0][2] and "+0.0%" not in lanes[1][2]
    assert themes[0] == themes[2] != themes[1]


def test_boxes_fill_what_ranks_have(run: Run) -> None:
    labels = run("return [...document.querySelectorAll('#placed figure')].map((x) => x.getAttribute('aria-label'));")
    assert "rank 1: B 0:1; H 0:4; S 16:32; D 0:4" in labels and "rank 1: B 0:1; H 1:2; S 0:64; D 0:4" in labels


def test_the_system_chooses_the_theme(run: Run, tmp_path: Path) -> None:
    body = (
        "return [matchMedia('(prefers-color-scheme: dark)').matches, getComputedStyle(document.body).backgroundColor];"
    )
    is_dark, colour = run(body, 1280, "--blink-settings=preferredColorScheme=0")
    assert (colour == "rgb(18, 22, 26)") == is_dark
