# Everything runs in one virtual environment, .venv, which the first command makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR: # an environment that could not be finished is made again
.PHONY: demo test check docs bench clean

demo: $(VENV)/demo-ready  ## train a small multi-camera detector with every operator; pictures in demo-output/
	$(BIN)/python -m saccade demo

test: check docs  ## lint, types, tests, docs
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests -m interpreted

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

clean:
	rm -rf $(VENV) site dist demo-output .pytest_cache .ruff_cache .hypothesis
