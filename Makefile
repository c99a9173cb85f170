# `make demo` and `make test` set up all they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch unless a GPU is present; `make TORCH=torch==2.9.0 …` chooses another.
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= $(shell grep '^torch==' constraints.txt)
CONSTRAINTS ?= constraints.txt
else
TORCH ?= torch
CONSTRAINTS ?= $(VENV)/constraints-gpu.txt
endif
BIN := $(VENV)/bin

.PHONY: demo test lint types coverage bench clean

demo: $(VENV)/ready
	$(BIN)/saemill demo -o demo-run

test: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints-gpu.txt
	$(BIN)/pip install --quiet $(TORCH) -c $(CONSTRAINTS)
	$(BIN)/pip install --quiet -e '.[dev]' -c $(CONSTRAINTS)
	touch $@

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.pipeline

clean:
	rm -rf $(VENV) demo-run
