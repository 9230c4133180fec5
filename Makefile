# A phone book: every target calls one command. What is computed is cached by content in the
# package, so nothing here looks at time stamps. Overrides: make table1 ARGS="model=local seed=1"
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
SSAH := $(BIN)/python -m ssah

# Models and data come from the package index or from disk; the hub only on request.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Their ids are written once, in the package.
ARTEFACTS := $(shell sed -n 's/^ *Artefact."\([a-z0-9_]*\)".*/\1/p' ssah/artefacts/__init__.py)
NOTEBOOKS := $(notdir $(basename $(wildcard notebooks/*.ipynb)))

.PHONY: help env setup plan smoke demo reproduce publish test test-notebooks lint bench site lock \
	clean-cache \
	$(ARTEFACTS) $(NOTEBOOKS)

help:
	@echo "make setup            create $(VENV) from requirements.lock"
	@echo "make plan             what there is to compute"
	@echo "make reproduce        every figure and table of the default run, then the claims table"
	@echo "make smoke            the same on a random model, in about three minutes"
	@echo "make demo             the claim on a small aligned model, in five minutes"
	@echo "make publish          conf/experiment/published.yaml, into results/published"
	@echo "make test             lint, types, unit, integration and notebook tests"
	@echo "make lint             style and types alone"
	@echo "make test-notebooks   the notebooks alone, on the smoke profile"
	@echo "make bench            seconds and memory of attribution and of each way to train"
	@echo "make site             docs and published results as a static site, in site/"
	@echo "make lock             pin the versions that are installed"
	@echo "make clean-cache      delete cached runs and downloads"
	@echo "artefacts:            $(ARTEFACTS)"
	@echo "notebooks:            $(NOTEBOOKS)"
	@echo 'overrides:            make table1 ARGS="seed=1 attribution.tokens=all"'

env:
	@test -x $(BIN)/ssah || $(MAKE) --no-print-directory setup

# Packages are compiled when they are first imported, and once: to compile all that is installed would
# take longer than the rest. Where no bytecode may be written, every process would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

setup:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -r requirements.lock
	$(BIN)/pip install --quiet --no-deps -e .

plan reproduce bench demo clean-cache: env
	$(SSAH) $@ $(ARGS)

publish: env
	$(SSAH) publish $(or $(ARGS),experiment=published)

smoke: env
	$(SSAH) reproduce profile=smoke $(ARGS)

$(ARTEFACTS): env
	$(SSAH) $@ $(ARGS)

$(NOTEBOOKS): env
	$(SSAH) notebook $@ $(ARGS)

lint: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# A process for each core; the longest tests are collected first (tests/conftest.py says which
# stay together).
test: env lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadfile \
		--no-loadscope-reorder $(ARGS)

test-notebooks: env
	$(BIN)/python -m pytest tests/notebooks $(ARGS)

# Nothing in it is fetched from elsewhere: `python -m http.server -d site` shows it.
site: env
	$(BIN)/python docs/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict -f build/site/mkdocs.yml

lock: env
	{ echo "# Made by make lock on Python 3.11, Linux."; $(BIN)/pip freeze --exclude-editable | \
		sed "s/+cpu$$//"; } \
		> requirements.lock.new && mv requirements.lock.new requirements.lock
