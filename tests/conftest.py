"""What every test shares: golden texts, and the end of the worker processes."""

from collections.abc import Iterator

import pytest

from tests.gloo_pool import collect_seldom, stop_pools
from tests.golden import Golden


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")


def pytest_collection_finish() -> None:
    collect_seldom()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden texts, see `tests/golden.py`."""
    return Golden(update=request.config.getoption("--update-golden"))


@pytest.fixture(scope="session", autouse=True)
def _pools_end_with_the_session() -> Iterator[None]:
    yield
    stop_pools()
