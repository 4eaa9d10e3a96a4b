"""The code of the pages runs as readers would type it: in one process, or on as many ranks as the page says."""

from __future__ import annotations

import pytest

from tests.support.gloo_pool import get_pool
from tests.support.pages import PAGES, Block, blocks, known_before, run_alone, run_on_a_rank, run_on_one_device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

# tests/end_to_end/test_examples.py runs that page, whose ops have to be made
ALONE = [name for name in PAGES if name != "extending.md" and any(x.page == name and x.ranks == 0 for x in blocks())]


@pytest.mark.parametrize("page", ALONE)
def test_blocks_for_one_process(page: str) -> None:
    """One after the other, in one namespace."""
    found = known_before()
    for block in blocks():
        if block.page == page and block.ranks == 0:
            run_alone(block.code, found)


@pytest.mark.parametrize("block", [block for block in blocks() if block.ranks], ids=str)
def test_a_block_for_several_ranks(block: Block) -> None:
    losses = get_pool(block.ranks).run(run_on_a_rank, block, timeout=240)
    assert len(set(losses)) == 1
    if losses[0] is not None:
        tolerance = 2e-2 if "bfloat16" in block.code else 1e-5
        assert losses[0] == pytest.approx(run_on_one_device(block), rel=tolerance)
