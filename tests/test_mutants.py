"""The mistakes that `make mutants` makes: each is a program that differs in one place."""

from __future__ import annotations

import pytest

from tests.mutants.mutations import KINDS, ROOT, draw, mutations_of

SOURCE = '''
"""A docstring with 1 + 1."""

@cached(maxsize=1)
def f(x: int = 3, *, flag: bool = True) -> int:
    assert x > 0, "x > 0"
    if x == 1 and not flag:
        log.info("x is %d", x + 1)
        g(x, x + 1)
        return x * 2
    total = [y for y in x if y]
    rule("... i k, k j -> ... i j", reduce="k")
'''

MADE = {
    "comparison": ["((x) != (1))"],
    "condition": ["not (x == 1 and not flag)", "True"],
    "connective": ["((x == 1) or (not flag))", "bool(flag)"],
    "constant": ["4", "False", "2", "2", "3"],
    "dropped": ["pass", "return None", "pass"],
    "operator": ["((x) - (1))", "((x) // (2))"],
    "swapped": ["g((x + 1), (x))"],
}


@pytest.mark.parametrize("kind", MADE)
def test_every_place_is_found_and_nothing_else(kind: str) -> None:
    assert [mutation.text for mutation in mutations_of("x.py", SOURCE) if mutation.kind == kind] == MADE[kind]


def test_letters_of_rules() -> None:
    made = [mutation.text for mutation in mutations_of("x.py", SOURCE) if mutation.kind == "letter"]
    assert "'i i k, k j -> ... i j'" in made and "'... i k, k j -> ... k j'" in made and '""' in made
    assert len(made) == len(set(made)) == 9


def test_a_sample_is_of_all_kinds_and_compiles() -> None:
    drawn = draw(80, seed=0)
    assert drawn == draw(80, seed=0) != draw(80, seed=1)
    assert {mutation.kind for mutation in drawn} == set(KINDS)
    for mutation in drawn:
        source = (ROOT / mutation.path).read_text()
        assert source[: mutation.start].count("\n") + 1 == mutation.line
        changed = mutation.apply(source)
        compile(changed, mutation.path, "exec")
        assert changed != source
        before, after = mutation.shown(source)
        assert before != after
