"""What every test shares: golden texts, the tiers, how to repeat what fails, and the end of the worker processes."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.gloo_pool import collect_seldom, seed_everything, stop_pools
from tests.support.golden import Golden
from tests.support.tiers import mark_what_is_covered

# the same examples at every run; one that fails is printed with what repeats it
hypothesis.settings.register_profile("sptransform", print_blob=True, derandomize=True)
hypothesis.settings.load_profile("sptransform")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")
    parser.addoption("--part", type=a_part, help="2/4: every fourth test, from the second on")


def a_part(text: str) -> slice:
    """Tests of every file are in every part, so that parts take about the same time."""
    part, num_parts = map(int, text.split("/"))
    if not 1 <= part <= num_parts:
        raise argparse.ArgumentTypeError(f"a part is I/N with I from 1 to N, not {text}")
    return slice(part - 1, None, num_parts)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_what_is_covered(items)
    if (part := config.getoption("--part")) is not None:
        items[:] = items[part]


def pytest_collection_finish() -> None:
    collect_seldom()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The command that repeats each test that failed, seeds among its parameters."""
    reports = [*terminalreporter.getreports("failed"), *terminalreporter.getreports("error")]
    if reports:
        terminalreporter.section("to repeat")
    # `make test TORCH=2.14.1` has an environment of its own
    venv = Path(sys.prefix).name
    torch = f"TORCH={venv.removeprefix('.venv-torch')} " if venv.startswith(".venv-torch") else ""
    for name in dict.fromkeys(report.nodeid for report in reports):
        terminalreporter.write_line(f"make test-all {torch}ARGS=" + shlex.quote(shlex.quote(name).replace("$", "$$")))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden texts, see `tests/support/golden.py`."""
    return Golden(update=request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    seed_everything()


@pytest.fixture(scope="session", autouse=True)
def _pools_end_with_the_session() -> Iterator[None]:
    yield
    stop_pools()
