# Two commands for a newcomer: `make demo` and `make test`. Both set up everything first, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One resolver run with torch and torchvision from the same release: a later one may not fit the other.
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: demo test setup check clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("layton needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch, torchvision' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/layton demo --out demo_out

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2  # one thread each: two processes of two threads slow one another down

clean:
	rm -rf $(VENV) build *.egg-info demo_out
