# `make train` and `make test` do all set-up in a fresh clone: Python 3.11 or newer with venv and pip is all they need.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Data sets kept beside the checkout, where there are any; recipes find relative paths under it.
ifneq ($(wildcard ../shared/data),)
export HEADWAY_DATA ?= $(abspath ../shared/data)
endif

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format docs browser clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */make \1\t/' | expand -t 16

setup: $(STAMP)  ## a virtual environment in .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headway needs Python 3.11 or newer")'
	@echo "Installing into .venv (some minutes, the first time only)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(STAMP)  ## train the quickstart and print how good it is
	$(BIN)/headway train recipes/quickstart.yaml --baselines --sample 'def '

# One thread a worker: results do not depend on how many cores there are, and workers do not fight for them.
test: $(STAMP)  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

lint: $(STAMP)  ## style, types and the order of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## put the code into its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the reference pages, from the code
	$(BIN)/python docs/reference.py

browser:  ## a headless browser for the report's test: from Debian, if we may
	@if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "Installing chromium for the report's test"; \
	  { apt-get update && apt-get install --yes --no-install-recommends chromium; } >/dev/null 2>&1 \
	    || echo "chromium could not be installed; the report's browser test will be skipped"; \
	fi

clean:  ## remove the environment and caches; runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build src/*.egg-info
