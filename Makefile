.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MATHEMATICS = $(wildcard $(foreach d,backbone performative reprogramming influence components,skperf/$(d)/[!_]*.py))
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE = 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -e 's/:.*##/\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

quickstart: $(VENV)/.installed  ## run every estimator on the shipped real data
	$(BIN)/python -m skperf

test: $(VENV)/.installed  ## run the tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed  ## ruff, mypy, import-linter, docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict $(MATHEMATICS)
	$(BIN)/lint-imports

clean:  ## remove what the other targets made
	rm -rf $(VENV) docs/_build skperf_quickstart .mypy_cache .ruff_cache

.PHONY: help quickstart test lint clean
