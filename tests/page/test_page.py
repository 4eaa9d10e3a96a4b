"""The page as a file: whole, small, without network, and every number says where it comes from."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sympy

import sptransform
from sptransform import UsageError
from sptransform.cost.formulas import B, N, S
from sptransform.cost.hardware import hardware_of
from sptransform.cost.time_formulas import Part, StepTimes
from sptransform.page import values
from sptransform.page.content import content
from sptransform.page.explanation import Explanation, fields_of
from sptransform.page.graphs import LONGEST, shortened, source
from sptransform.page.render import _facts
from sptransform.page.sliders import javascript
from sptransform.page.step_times import step_times
from tests.page.shown import LAYERS, comparison, stack

pytestmark = pytest.mark.timeout(240)
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """Elements of a page, whose tags must nest; text and attributes of each element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.labelled: list[bool] = []
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self._texts: list[list[str]] = []
        self._attributes: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("input", "select", "button"):
            self.labelled.append("label" in self.open or "aria-label" in dict(attrs) or tag == "button")
        if tag in VOID:
            self.elements.append((tag, dict(attrs), ""))
            return
        self.open.append(tag)
        self._texts.append([])
        self._attributes.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        text = "".join(self._texts.pop())
        self.elements.append((tag, self._attributes.pop(), text))
        if self._texts:
            self._texts[-1].append(text)

    def handle_data(self, data: str) -> None:
        if self._texts:
            self._texts[-1].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for found, attributes, text in self.elements if found == tag]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "out.html"
    comparison().html(path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def data(page: Page) -> dict[str, Any]:
    (found,) = [text for attributes, text in page.all("script") if attributes.get("id") == "data"]
    return json.loads(found)


def test_nothing_is_fetched(text: str, page: Page) -> None:
    assert "http" not in text and "url(#" in text and "@import" not in text
    links = [x for _, attributes, _ in page.elements for key, x in attributes.items() if key in ("src", "href")]
    assert all(link.startswith(("#", "data:")) for link in links), links


def test_it_is_small(text: str) -> None:
    assert len(text.encode()) < 200_000


def test_ids_are_unique_and_links_lead_to_them(page: Page) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link, _ in page.all("a")} <= set(ids)
    names = [x for _, attributes, _ in page.elements if (x := attributes.get("aria-labelledby"))]
    assert set(names) <= set(ids)


def test_every_number_says_where_it_comes_from(page: Page) -> None:
    numbers = [attributes for attributes, _ in page.all("span") if attributes.get("class") == "n"]
    assert len(numbers) > 3 * len(comparison().runnable)
    assert {attributes["data-p"] for attributes in numbers} == set(values.MEANINGS)
    cells = [text for attributes, text in page.all("td") if "num" in (attributes.get("class") or "")]
    marked = [text for attributes, text in page.all("span") if attributes.get("class") == "n"]
    assert cells and all(any(text.strip().startswith(mark) for mark in marked) for text in cells)


def test_tables_have_headers_and_controls_have_names(page: Page) -> None:
    assert all(attributes.get("scope") for attributes, _ in page.all("th"))
    assert len(page.labelled) > 8 and all(page.labelled)
    assert all(attributes.get("aria-label") or text.strip() for attributes, text in page.all("button"))


def test_totals_are_those_of_the_step(page: Page) -> None:
    titles = {attributes.get("title") for attributes, _ in page.all("span")}
    for option in comparison().runnable:
        for direction in ("forward", "backward"):
            assert f"{option.step.bytes_sent(direction):,} bytes, counted" in titles
        assert f"{option.step.peak_bytes():,} bytes, counted" in titles
        assert f"{option.timeline.seconds:.9g} s, simulated" in titles


def test_what_is_sent_in_layers_adds_up(data: dict[str, Any]) -> None:
    for option, shown in zip(comparison().options, data["options"], strict=True):
        if option.step is not None:
            *_, counts, sizes = zip(*shown["where"], strict=True)
            assert (sum(counts), sum(sizes)) == (option.step.messages(), option.step.bytes_sent())


def test_equal_layers_are_drawn_once(data: dict[str, Any]) -> None:
    assert sum(segment["times"] for segment in data["segments"] if "layers" in segment["title"][:7]) == LAYERS
    assert max(segment["times"] for segment in data["segments"]) >= LAYERS - 2


def test_lines_are_those_of_the_graphs(data: dict[str, Any]) -> None:
    texts = data["texts"]
    for option, shown in zip(comparison().options, data["options"], strict=True):
        if option.explanation is None:
            continue
        lines = {line.strip() for layer in option.explanation.to_dict()["graph"].values() for line in layer}
        written = [data["lines"][at] for own in shown["graph"] for at in own]
        assert written
        for name, *_ in written:
            assert any(line.startswith((f"%{texts[name]} ", "return")) for line in lines), texts[name]


def test_text_of_the_user_is_data(text: str, data: dict[str, Any]) -> None:
    assert text.count("</script>") == 2
    assert any('"<script>" < "&"' in line for line in data["texts"])


def test_rings_are_those_of_partitions(data: dict[str, Any]) -> None:
    (ring,) = data["rings"]
    assert ring["ranks"] == 4
    pairs = 64 * 65 // 2
    assert {sum(sums) for sums in ring["sums"].values()} == {pairs}
    assert len(set(ring["sums"]["zigzag"])) == 1
    assert ring["slowest"]["contiguous"] > 1.5 * ring["slowest"]["zigzag"] >= 1.5 * pairs / 4


@pytest.mark.slow
def test_a_page_of_one_strategy_and_of_one_rank(tmp_path: Path) -> None:
    model, inputs = stack(1)
    for world_size in (1, 2):
        explained = sptransform.explain(model, "ulysses", inputs, world_size=world_size)
        explained.html(tmp_path / "one.html", title="a < b")
        page = Page((tmp_path / "one.html").read_text(encoding="utf-8"))
        assert page.all("h1")[0][1] == page.all("title")[0][1] == "a < b"
        assert "simulated" not in {x.get("data-p") for x, _ in page.all("td")}


def test_numbers_have_three_digits() -> None:
    shown = [values.num_bytes(x).text for x in (0, 7, 1023, 1024, 1_048_000, 1_048_500, 12_345_678, 2**50)]
    assert shown == ["0 B", "7 B", "1,023 B", "1 KiB", "1,023 KiB", "1 MiB", "11.8 MiB", "1 PiB"]
    assert [values.seconds(x).text for x in (2.5, 0.25, 1e-3, 2e-5, 0)] == ["2.5 s", "250 ms", "1 ms", "20 µs", "0 µs"]
    assert [values.flops(x).text for x in (999, 123_456, 5 * 10**18)] == ["999 FLOP", "123 kFLOP", "5 EFLOP"]
    assert values.share(0.125).text == "+12.5%"


def test_long_lists_lose_their_middle() -> None:
    types = ", ".join(f"f32[{i}] R" for i in range(300))
    short = shortened(types)
    assert short.startswith("f32[0] R, f32[1] R, … 297 more …, f32[299] R") and len(short) <= LONGEST
    assert shortened("x" * 300) == "x" * (LONGEST - 1) + "…"


def test_source_lines_lose_the_folders_of_packages() -> None:
    assert source("/a/lib/site-packages/lib/m.py:3: y = 2") == "lib/m.py:3: y = 2"
    assert source("/home/me/m.py:3: y = 2") == "/home/me/m.py:3: y = 2" and source(None) == ""


def test_formulas_become_javascript() -> None:
    assert javascript(sympy.Max(S, B) / N) == "Math.max(B, S)/N"
    with pytest.raises(ValueError, match="no slider for H"):
        javascript(S * sympy.Symbol("H"))


def test_times_that_are_a_sum_nowhere_take_no_room() -> None:
    """Between nodes messages run beside kernels, on every machine that has such links."""
    option = comparison().runnable[0]

    def shown(ranks: tuple[int, ...]) -> dict[str, Any] | None:
        parts = {Part("all_gather", (8 * S,), ranks): 3}
        times = StepTimes({4: parts}, {4: option.name}, 1, 64, hardware_of("h100-nvlink"))
        return step_times([replace(option, times=times)], "h100-nvlink")

    assert shown((0, 8)) is None and step_times([option], "h100-nvlink") is None
    found = shown((0, 1, 2, 3))
    assert (found["options"], found["parts"], found["quantities"]) == ([{4: [0, 3]}], [(0, (0,), (0, 1, 4))], ["8*S"])


def test_the_largest_texts_are_pooled(data: dict[str, Any]) -> None:
    assert len(data["texts"]) == len(set(data["texts"]))
    assert len({tuple(line) for line in data["lines"]}) == len(data["lines"])
    assert all(len(json.dumps(option)) < 12_000 for option in data["options"])


@pytest.mark.slow
def test_expanded_rings_are_steps_with_a_backward(tmp_path: Path) -> None:
    model, inputs = stack(1)
    plain, shown = (sptransform.explain(model, "ring", inputs, world_size=4, expand=expand) for expand in (False, True))
    assert "sptransform.attention_block(" in shown.graph() and "sptransform.ring_attention(" in plain.graph()
    assert shown.step == plain.step and shown.step.bytes_sent("backward") > 0
    for explained in (plain, shown):
        explained.html(tmp_path / f"{explained is plain}.html", title="one")
    assert (tmp_path / "True.html").read_text() == (tmp_path / "False.html").read_text()


@pytest.mark.slow
def test_strategies_go_by_short_names(tmp_path: Path) -> None:
    model, inputs = stack(1)
    explained = sptransform.explain(model, ("ring", "megatron"), inputs, world_size=(2, 2))
    explained.html(tmp_path / "pair.html")
    page = Page((tmp_path / "pair.html").read_text(encoding="utf-8"))
    assert page.all("h1")[0][1] == "ring x megatron on 4 ranks"
    assert any("mesh 2 × 2" in text for _, text in page.all("th"))


def test_the_most_that_a_strategy_keeps_of_parameters_is_no_figure_of_all() -> None:
    options = comparison().runnable
    assert "up to " in _facts(options, None)  # megatron keeps a part
    assert "up to " not in _facts(options[:1], None)


def test_the_limit_is_that_of_the_machine_in_the_users_file(tmp_path: Path) -> None:
    mine = tmp_path / "h200.json"  # a name that the library has too
    mine.write_text('{"what": "mine", "extends": "h100-ib", "constants": {"memory.bytes": [12345, "B", "me"]}}')
    model, inputs = stack()
    explanation = sptransform.explain(model, "ring", inputs, world_size=2, hardware=str(mine))
    assert content([explanation.option], "h200").data["limit"] == 12345


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    option = comparison().runnable[0]
    explanation = Explanation(**fields_of(option.explanation), hardware=hardware_of("h100-nvlink"))
    for write in (explanation.html, explanation.trace, comparison().html, comparison().trace):
        with pytest.raises(UsageError, match="missing/out cannot be written"):
            write(tmp_path / "missing" / "out")
    assert not {"step", "timeline"} & vars(explanation).keys()
