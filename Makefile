# Two commands: `make prune` runs the main job, `make test` the tests. Both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Spinning OpenMP threads slow two processes at once down by up to 20x.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install prune test lint clean

install: $(VENV)/.installed

# constraints.txt pins torch==2.13.0, so that a machine's own CPU wheel is used and nothing with CUDA is fetched.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

prune: install
	$(BIN)/minipuzzle prune

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
