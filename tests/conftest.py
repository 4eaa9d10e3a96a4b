"""What every test shares: the end of the worker processes."""

from collections.abc import Iterator

import pytest

from tests.gloo_pool import stop_pools


@pytest.fixture(scope="session", autouse=True)
def _pools_end_with_the_session() -> Iterator[None]:
    yield
    stop_pools()
