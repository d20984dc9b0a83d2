# Every target sets up what it needs: a virtual environment of its own, made when there is none.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
# `make test EXTRAS=test,hf` adds the tests against torch and transformers.
EXTRAS ?= test
TASK ?= sentiment
# `make mutants FILES=ppo_kernel/losses.py` breaks one file; docs/mutants_results.md has the results.
WORKERS ?= 2
RESULTS ?= .benchmarks/results.json
BASELINE ?= bench/baseline.json
# Tunix needs Python 3.12.
PYTHON312 ?= python3.12
BIN := $(VENV)/bin
# Huge pages for the memory that XLA allocates on a CPU: a tenth off the time of an update. For glibc alone.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test bench bench-check bench-baseline bench-scaling bench-peers mutants lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/ppo-kernel demo --task $(TASK)

test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

# `make bench BENCH_SIZES=tiny,qwen05`; what the numbers mean is in docs/benchmarks.md.
bench: $(VENV)/.installed-bench
	mkdir -p .benchmarks
	$(BIN)/python -m pytest bench --quiet --benchmark-json=$(RESULTS) --benchmark-columns=median,min,rounds
	$(BIN)/python -m bench.report run $(RESULTS) .benchmarks/bench.png

# Each benchmark as a ratio to a calibration kernel, against the saved ratios.
bench-check: bench
	$(BIN)/python -m bench.regression check $(RESULTS) $(BASELINE)

bench-baseline: bench
	$(BIN)/python -m bench.regression save $(RESULTS) $(BASELINE)

bench-scaling: $(VENV)/.installed-bench
	mkdir -p .benchmarks
	$(BIN)/python -m bench.scaling --plot .benchmarks/scaling.png $(SCALING_ARGS)

# Other frameworks, each in an environment of its own; `make bench-peers PEERS_ARGS='--shape SMALL'`.
bench-peers: $(VENV)/.installed-bench .venv-tunix/.installed .venv-trl/.installed
	TUNIX_PYTHON=.venv-tunix/bin/python TRL_PYTHON=.venv-trl/bin/python \
		$(BIN)/python -m bench.peers.compare $(PEERS_ARGS)

.venv-tunix/.installed: bench/peers/tunix.txt
	$(PYTHON312) -m venv .venv-tunix
	.venv-tunix/bin/python -m pip install --quiet --requirement $<
	touch $@

.venv-trl/.installed: bench/peers/trl.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --requirement $<
	touch $@

mutants: $(VENV)/.installed-mutants
	$(BIN)/python tests/mutants/run.py --workers $(WORKERS) $(FILES)

lint: $(VENV)/.installed-dev
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
	rm -rf .venv .venv-* .mutants build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
