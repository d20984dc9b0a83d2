# Every target sets up what it needs: a virtual environment of its own, made when there is none.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
# `make test EXTRAS=test,hf` adds the tests against torch and transformers.
EXTRAS ?= test
TASK ?= sentiment
BIN := $(VENV)/bin

.PHONY: demo test bench lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/ppo-kernel demo --task $(TASK)

test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m pytest bench --benchmark-group-by=group --benchmark-columns=median,min,rounds

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
