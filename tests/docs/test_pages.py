"""README.md and docs/: links lead somewhere, code is code, tables are complete, and nothing is fetched."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re

import pytest

import sptransform
from sptransform.strategies.names import strategy_of
from tests.support.pages import PAGES, ROOT, anchors, blocks, prose

TEXTS = {name: page.read_text() for name, page in PAGES.items()}
CONFIG = (ROOT / "mkdocs.yml").read_text()
STRATEGIES = ("ulysses", "ring", "allgather", "usp", "megatron")


def test_links_and_anchors_lead_somewhere() -> None:
    for name, text in TEXTS.items():
        links = re.findall(r"\]\(([^)]+)\)", prose(text))
        targets = re.findall(r"^\[([^]]+)\]: ", text, re.MULTILINE)
        assert {label for _, label in re.findall(r"(\[[^]]+\])\[([^]]+)\]", prose(text))} == set(targets), name
        for link in links:
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            page = (PAGES[name].parent / path).resolve() if path else PAGES[name]
            assert page.is_relative_to(ROOT) and page.exists(), f"{name}: {link}"
            assert not anchor or anchor in anchors(page.read_text()), f"{name}: {link}"


def test_blocks_of_code_compile() -> None:
    for block in blocks():
        ast.parse(block.code, str(block))
    assert sum(bool(block.ranks) for block in blocks()) >= 10


def test_the_readme_is_two_screens() -> None:
    assert TEXTS["README.md"].count("\n") <= 100
    read_on = set(re.findall(r"docs/(\w+\.md)", TEXTS["README.md"]))
    assert read_on == PAGES.keys() - {"README.md", "index.md"}


def test_versions_of_torch_are_those_that_can_be_installed() -> None:
    low, high = re.findall(r'"torch>=2\.(\d+),<2\.(\d+)"', (ROOT / "pyproject.toml").read_text())[0]
    said = {found for text in TEXTS.values() for found in re.findall(r"PyTorch 2\.(\d+) to 2\.(\d+)", text)}
    assert said == {(low, str(int(high) - 1))}


def test_every_page_is_in_the_navigation() -> None:
    nav = set(re.findall(r"(\w+\.md)", CONFIG.partition("\nnav:")[2]))
    assert nav == PAGES.keys() - {"README.md"} | {"architecture.md", "changelog.md"}


def test_every_argument_is_explained() -> None:
    rows = {
        heading: dict(re.findall(r"^\| `(\w+)` \|(.*?)\|", part, re.MULTILINE))
        for heading, part in re.findall(r"^## `(\w+)\(.*?\n(.*?)(?=^##|\Z)", TEXTS["arguments.md"], re.M | re.S)
    }
    expected = {name: p.default for name, p in inspect.signature(sptransform.parallelize).parameters.items()}
    assert rows["parallelize"].keys() == expected.keys()
    for name, default in expected.items():
        shown = rows["parallelize"][name].strip(" `")
        assert shown == "" if default is inspect.Parameter.empty else ast.literal_eval(shown) == default, name
    own = inspect.signature(sptransform.explain).parameters.keys() - {"model", "strategy", "options"}
    assert rows["explain"].keys() == own


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_option_of_a_strategy_is_in_its_table(name: str) -> None:
    (shown,) = re.findall(rf'^\| `"{name}"` \| `(.*?)` \|', TEXTS["strategies.md"], re.MULTILINE)
    made = eval(shown, vars(sptransform) | {"__builtins__": {}})
    assert made == strategy_of(name)
    assert set(re.findall(r"(\w+)=", shown)) == {field.name for field in dataclasses.fields(made)}


def test_the_api_page_has_all_names() -> None:
    shown = set(re.findall(r"^::: sptransform\.([\w.]+)$", TEXTS["api.md"], re.MULTILINE))
    assert shown == {*sptransform.__all__, "testing.check_rule"}


def test_pictures_fetch_nothing() -> None:
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    drawn = ["compare.svg", "demo.svg", "explain.svg"]
    taken = ["page.png", "page_dark.png", "page_graph.png", "page_ring.png"]
    assert [picture.name for picture in pictures] == drawn + taken
    assert all((ROOT / "docs" / "images" / name).stat().st_size < 300_000 for name in taken)
    for picture in pictures[: len(drawn)]:
        assert not re.search(r"url\((?!#)|@import|@font-face|href=", picture.read_text()), picture
