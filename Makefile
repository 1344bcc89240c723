# From a fresh clone, with nothing but Python 3.11 or newer:
#   make demo    train the embedded model on this machine
#   make test    the tests
# A run's options go into ARGS: make demo ARGS="--iterations 20 --seed 1"

.DEFAULT_GOAL := help
SHELL := /bin/sh
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

# The first of these that runs and is new enough; PYTHON=/path/to/python overrides it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
    echo $$python; break; fi; done)

# What pip leaves uncompiled, the first process that imports it compiles for all later ones. Images
# for containers often forbid that: then each process would take seconds longer to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test bench lint docs clean

help:
	@echo "make setup      create $(VENV) and install diffusion-grpo into it"
	@echo "make demo       fine-tune the embedded model; pictures before and after"
	@echo "make test       run the tests"
	@echo "make bench      time the phases of the demo's iteration on this machine"
	@echo "make lint       check style and types"
	@echo "make docs       build the documentation into site/"
	@echo "make clean      remove $(VENV) and caches; runs/ stays"

$(VENV)/.created:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python" >&2; \
	  exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) does not run or is older than Python 3.11; expected 3.11 or newer" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) has no working venv module (on Debian and Ubuntu: install python3-venv)" >&2; \
	  exit 1; }
	@touch $@

# One stamp for each set of dependencies; pyproject.toml is newer when they changed.
$(VENV)/.run: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	@touch $@ $(VENV)/.run

$(VENV)/.dev: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	@touch $@ $(VENV)/.run

setup: $(VENV)/.run

# A run directory is never overwritten: runs/demo, then runs/demo-2, runs/demo-3, ...
demo: $(VENV)/.run
	@output=runs/demo; number=1; \
	while [ -e "$$output" ]; do number=$$((number + 1)); output=runs/demo-$$number; done; \
	$(BIN)/diffusion-grpo train demo --output "$$output" $(ARGS) && \
	echo "Pictures before and after: $$output/samples/   The trained model: $$output/final/"

test: $(VENV)/.test
	$(BIN)/pytest -n auto --dist worksteal $(ARGS)

bench: $(VENV)/.run
	$(BIN)/diffusion-grpo bench $(ARGS)

# Pyright reads the imports of what is tested too: of extras, and of the peer in tests/peers/.
lint: $(VENV)/.dev $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

# Strict: a broken link fails.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .ci/mkdocs.yml

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
