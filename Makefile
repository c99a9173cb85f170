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
# Processes that share out the test files; each takes up to 2 GiB. Two more than two cores, since many tests wait.
WORKERS ?= 4
PYTEST = SAEMILL_PEERS=$(abspath $(VENV)-peers) OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	-n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo lint test coverage tutorial bench bench-pipeline bench-others clean

demo: $(VENV)/ready
	$(BIN)/saemill demo -o demo-run

# `make -j2 test` sets up both environments at a time, and checks the types beside the second.
test: lint $(VENV)-peers/ready
	$(PYTEST)

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What the tests run of saemill, line by line: apart, since tracing makes the tests half as long again.
coverage: $(VENV)/ready $(VENV)-peers/ready
	$(PYTEST) --cov --cov-report=term:skip-covered

# docs/tutorial.ipynb run anew, with its outputs.
tutorial: $(VENV)/ready
	$(BIN)/python tests/test_tutorial.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -v '^\($(FREE)\)==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet '$(TORCH)' -c $(VENV)/constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c $(VENV)/constraints.txt
	touch $@

# `make bench`: a step by its parts, saemill beside sparsify, SAELens and dictionary_learning on planted rows,
# and the loader beside plain reads (3 GiB of disk). `make bench BENCH="--device cuda"` passes options to all
# but the last. `.venv/bin/python -m benchmarks` lists every benchmark.
bench: $(VENV)/ready $(VENV)-peers/ready
	mkdir -p bench-run
	$(BIN)/python -m benchmarks.step.parts $(BENCH) -o bench-run/step.md
	$(BIN)/python -m benchmarks.train.peers --tokens 131072 --seconds 60 $(BENCH) -o bench-run/narrow
	$(BIN)/python -m benchmarks.train.peers --latents 24576 --rounds 2 $(BENCH) -o bench-run/wide
	$(BIN)/python -m benchmarks.train.peers --dead-share 0.25 $(BENCH) -o bench-run/dead
	$(BIN)/python -m benchmarks.train.sweep $(BENCH) -o bench-run/sweep
	$(BIN)/python -m benchmarks.cache.loader -o bench-run/loader

# `make bench-pipeline MODEL=… TRAIN=… VALID=…`: a model and two texts of your own.
bench-pipeline: $(VENV)/ready
	$(BIN)/python -m benchmarks.scale.pipeline --model '$(MODEL)' --train-text '$(TRAIN)' --valid-text '$(VALID)' -o bench-run/pipeline

# `make bench-others RUN=… TOKENS=…`: a run's figures beside those of SAELens' and SAEBench's evaluations.
bench-others: $(VENV)/ready $(VENV)-peers/ready
	$(BIN)/python -m benchmarks.evaluate.others '$(RUN)' '$(TOKENS)' -o bench-run/others

# sparsify, SAELens, SAEBench, dictionary_learning and circuit-tracer, which tests and benchmarks run beside
# saemill.
$(VENV)-peers/ready: peers-requirements.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip install --quiet '$(TORCH)'
	$(VENV)-peers/bin/pip install --quiet --no-deps -r peers-requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-peers demo-run bench-run
