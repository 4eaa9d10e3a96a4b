"""Mutation testing: what kinds of mistakes the tests see, and which of them no test sees.

    make mutants                            120 mistakes, the tests of `make test`
    make mutants ARGS="--whole"             and those of `make test-all`, for what these do not see
    make mutants ARGS="--num 20 --seed 3"

One mistake at a time is put into a copy of the checkout (`mutations.py`), and the tests that reach its line are run,
cheap ones first, until one fails. Which tests reach a line is recorded before, once for each state of the sources
(`recorder.py`, `reach.py`). Why a mistake is no fault, where it is none, stands in `no_fault.json`. What is found is
kept in `.mutants/`, so that a run that was stopped goes on where it was.
"""
