# Every target works on a machine that has nothing but Python 3.10+ and make: the first call
# creates .venv and installs into it, later calls find the stamp file and go straight to work.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: help demo test slow lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small Llama on one device and on 4 ranks, compare the losses"
	@echo "make test    run the tests"
	@echo "make slow    run the tests marked slow"
	@echo "make lint    run ruff"
	@echo "make bench   measure the time of the transform, and of attention beside others"
	@echo "make clean   remove .venv and caches"

demo: $(VENV)/.installed-examples
	$(RUN) examples/quickstart.py $(ARGS)

test: $(VENV)/.installed-test
	$(RUN) -m pytest $(ARGS)

slow: $(VENV)/.installed-test
	$(RUN) -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .

bench: $(VENV)/.installed-examples
	$(RUN) benchmarks/transform_time.py
	$(RUN) benchmarks/attention.py

$(RUN):
	$(PYTHON) -m venv $(VENV)

# One rule for every extra: .installed-test means `pip install -e '.[test]'` has run.
$(VENV)/.installed-%: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
