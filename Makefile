# `make demo` and `make test` set up all they need in .venv first.
PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch unless a GPU is present; `make TORCH=torch==2.9.0 …` chooses another.
PINNED := $(shell grep '^torch==' constraints.txt)
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= $(PINNED)
else
TORCH ?= torch
endif
# Another torch brings the triton that it was made with.
ifeq ($(TORCH),$(PINNED))
FREE := torch
else
FREE := torch\|triton
endif
BIN := $(VENV)/bin

.PHONY: demo test bench clean

demo: $(VENV)/ready
	$(BIN)/saemill demo -o demo-run

test: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -v '^\($(FREE)\)==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet '$(TORCH)' -c $(VENV)/constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c $(VENV)/constraints.txt
	touch $@

# `make bench MODEL=… TRAIN=… VALID=…`: a model and two texts of your own.
bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.pipeline --model '$(MODEL)' --train-text '$(TRAIN)' --valid-text '$(VALID)' -o bench-run

clean:
	rm -rf $(VENV) demo-run bench-run
