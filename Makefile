# All of them work in a fresh clone: they make .venv and install exact versions first.
#   make quickstart   train the small hybrid on real text, compare it, sample from it
#   make test         lint, types, the whole test suite
#   make notebooks    run the notebooks at their default size and keep their outputs (minutes each)
#   make test-parity  published checkpoints against transformers (installs torch)
PYTHON ?= python3
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/py$(VERSION).txt
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: install quickstart notebooks test test-parity lint types clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

# The tests also compile for TPU, where its compiler has a wheel.
$(VENV)/.installed-aot: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,aot]'
	touch $@

$(VENV)/.installed-parity: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,parity]'
	touch $@

$(CONSTRAINTS):
	@echo "longspan is tested on Python 3.11 and 3.12; for another version make $@ from a working environment" && exit 1

quickstart: install
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=runs/quickstart

notebooks: install
	$(BIN)/python -m tools.notebooks

test: install lint types $(VENV)/.installed-aot
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not aot"
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m aot  # libtpu in processes of its own

test-parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/parity

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .jax_cache .mypy_cache .ruff_cache .pytest_cache
