# Everything runs in one virtual environment, .venv, which the first command makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process for each core, but no more than four: on a GPU each takes memory for a context of its own. One thread each, or
# PyTorch would take every core in every process. Tests take very different times, which `worksteal` evens out.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal
# What the GPU tests run with: `make test-gpu WITH=python3` takes a Python that has torch, Triton and pytest already.
WITH ?= $(BIN)/python

.DELETE_ON_ERROR: # an environment that could not be finished is made again
.PHONY: demo test test-all test-torch test-gpu check docs bench clean

demo: $(VENV)/demo-ready  ## train a small multi-camera detector with every operator; pictures in demo-output/
	$(BIN)/python -m saccade demo

test: check docs  ## lint, types, docs, and all tests but slow ones
	$(PYTEST) --durations=10 -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) --durations=10 tests -m "interpreted and not slow"

test-all: check docs  ## all tests, slow ones too, and those for the newest PyTorch
	$(PYTEST) --durations=10
	TRITON_INTERPRET=1 $(PYTEST) --durations=10 tests -m interpreted
	$(MAKE) test-torch TORCH=2.15.0

# Another environment beside the first one, without its pins: torch brings the Triton that it wants.
test-torch: BIN := $(VENV)-torch-$(TORCH)/bin
test-torch: $(VENV)-torch-$(TORCH)/ready  ## all tests with another PyTorch: `make test-torch TORCH=2.15.0`
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests -m interpreted

# Tests that fill the memory of a GPU first and one after the other, then all others beside each other.
test-gpu: $(if $(filter $(BIN)/python,$(WITH)),$(VENV)/ready)  ## all tests that a GPU can run; fails where there is none
	$(WITH) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch finds no GPU")'
	OMP_NUM_THREADS=1 PYTHONPATH=src $(WITH) -m pytest --durations=10 -m gpu_memory
	OMP_NUM_THREADS=1 PYTHONPATH=src $(WITH) -m pytest --durations=10 -m "not gpu_memory" \
		--numprocesses logical --maxprocesses 16 --dist worksteal

check: $(VENV)/ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/ready  ## build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/ready  ## times on this machine's GPU
	$(BIN)/python -m saccade bench

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	touch $@

$(VENV)-torch-%/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet torch==$* --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-torch-* site dist demo-output .pytest_cache .ruff_cache .hypothesis
