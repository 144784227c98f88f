# `make demo` and `make test` work on a fresh machine: the first call sets everything up.
VENV ?= .venv
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c '$(FITS)' 2>/dev/null && { echo $$p; break; }; done)
SEED ?= 0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint lock clean lab-up lab-down
.DEFAULT_GOAL := help

help:
	@echo "make demo   set up, then prepare data, train, evaluate and report (SEED=0)"
	@echo "make test   set up, then run the tests"
	@echo "make lint   set up, then check style, format and types"
	@echo "make lab-up, make lab-down   a two-node SLURM on this one machine, to try things (root)"
	@echo "make lock   renew requirements.lock from pyproject.toml"
	@echo "make clean  remove the environment and the folder of the demo (not mlflow.db, which has all runs)"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || \
		{ echo "no Python 3.11 or 3.12 found: give one with make PYTHON=..."; exit 1; }
	@echo "setting up $(VENV) (about 7 GB on disk, once)"
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "no virtual environment without Debian's package python3-venv: install it"; exit 1; }
	@$(BIN)/python -m pip install --quiet --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: setup
	@$(BIN)/reprise demo --seed $(SEED)

# Jobs on a cluster get the cores to themselves, as few other tests leave them any.
test: setup
	@$(BIN)/python -m pytest --ignore tests/cluster --numprocesses logical --maxprocesses 4 --dist worksteal
	@$(BIN)/python -m pytest tests/cluster --numprocesses 2 --maxschedchunk 1

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lab-up:
	@slurm/lab/up

lab-down:
	@slurm/lab/down

lock: setup
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--upgrade --quiet --no-header --output-file requirements.lock
	@echo "renewed requirements.lock; the next make installs it"

clean:
	rm -rf $(VENV) demo
