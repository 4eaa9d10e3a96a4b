# Every target works on a machine that has nothing but Python 3.10+ and make: the first call
# creates .venv and installs into it, later calls find the stamp file and go straight to work.
# TORCH=2.14.1 runs any target with that version of torch, in a .venv of its own. Without, it is the version that all of
# this was developed with; pip alone would take the newest that pyproject.toml allows.

PYTHON  ?= python3
DEFAULT := 2.13.0
TORCH   := $(DEFAULT)
VENV    := .venv$(if $(filter-out $(DEFAULT),$(TORCH)),-torch$(TORCH))
RUN     := $(VENV)/bin/python

.PHONY: help demo test test-all mutants times lint sweep bench gpu docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      train a small Llama on one device and on 4 ranks, compare the losses"
	@echo "make test      run the quick tier of the tests"
	@echo "make test-all  run all tests, in four parts one after the other; PART=2/4 for one of them"
	@echo "make mutants   make small mistakes in the sources, and see whether the tests notice"
	@echo "make times     show where the processor time of the tests goes"
	@echo "make lint      run ruff"
	@echo "make sweep     compare every architecture of transformers and diffusers with one device; goes on where it stopped"
	@echo "make bench     measure the time of the transform, attention beside others, and memory"
	@echo "make gpu       check kernels, strategies and Inductor on the CUDA device of this machine; prints a JSON"
	@echo "make docs      build the pages of docs/ into site/; nothing is fetched"
	@echo "make clean     remove .venv and caches"
	@echo "With TORCH=2.14.1, all but the last do it with that version of torch."

demo: $(VENV)/.installed-examples
	$(RUN) examples/quickstart.py $(ARGS)

test: $(VENV)/.installed-test
	$(RUN) -m pytest $(ARGS)

PARTS := 1/4 2/4 3/4 4/4
# what pyproject.toml leaves out is run as well
ALL   := $(RUN) -m pytest -o addopts=--strict-markers

test-all: $(VENV)/.installed-test
ifneq ($(ARGS)$(PART),)
	$(ALL) $(if $(PART),--part $(PART)) $(ARGS)
else
	@failed=0; for part in $(PARTS); do $(MAKE) test-all PART=$$part || failed=1; done; exit $$failed
endif

mutants: $(VENV)/.installed-dev
	$(RUN) -m tests.mutants $(ARGS)

times: $(VENV)/.installed-dev
	$(RUN) benchmarks/suite_time.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .

sweep: $(VENV)/.installed-sweep
	$(RUN) -m sptransform.sweep $(ARGS)

bench: $(VENV)/.installed-examples
	$(RUN) benchmarks/transform_time.py
	$(RUN) benchmarks/attention.py
	$(RUN) benchmarks/memory.py
	$(RUN) benchmarks/loss_memory.py

gpu: $(VENV)/.installed-test
	@$(RUN) benchmarks/gpu.py $(ARGS)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

$(RUN):
	$(PYTHON) -m venv $(VENV)

# One rule for every extra: .installed-test means `pip install -e '.[test]'` has run.
$(VENV)/.installed-%: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --editable '.[$*]' torch==$(TORCH)
	@touch $@

clean:
	rm -rf .venv .venv-torch* build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .mutants .sweep
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
