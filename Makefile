# Two commands do everything on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo test lint benchmark figures compile-check clean

help:
	@echo "make demo       set up, train CILA and two rivals on digits, certify the runs, draw the figures"
	@echo "make test       set up, check style and types, run all tests"
	@echo "make benchmark  times of the bounds"
	@echo "make compile-check  compile the GPU kernels with the oldest and newest Triton (no GPU needed)"
	@echo "make figures    the figures of the README, from the logs in the repository"
	@echo "make clean      remove the environment and the demo's runs"

# PyTorch first and alone: on Linux without an NVIDIA GPU its CPU build, where that index can be reached, instead of 3 GB
# of CUDA packages that nothing here would use.
$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python >= 3.11 is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@index=""; \
	if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	   curl --silent --fail --max-time 5 --output /dev/null $(CPU_INDEX)/torch/ 2>/dev/null; \
	then index="--extra-index-url $(CPU_INDEX)"; fi; \
	set -x; $(BIN)/pip install --quiet $$index --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.done
	$(BIN)/python -m experiments sweep experiments/specs/demo.toml --jobs $(JOBS) --out $(DEMO)
	$(BIN)/cila-bound evaluate $(DEMO)/digits/cila-max-seed0/losses.jsonl
	@echo; echo "The same of all runs, as JSON: $(DEMO)/certificates.jsonl"
	@$(BIN)/cila-bound evaluate --json $(DEMO)/digits/*/losses.jsonl > $(DEMO)/certificates.jsonl
	@echo; $(BIN)/python -m paper_figures --runs $(DEMO) --out $(DEMO)/figures

test: lint
	$(BIN)/python -m pytest --quiet --numprocesses $(JOBS)

lint: $(VENV)/.done
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy

benchmark: $(VENV)/.done
	$(BIN)/python -m pytest --quiet tests/benchmark_bounds.py

# The oldest and the newest supported Triton, beside the one in the environment.
compile-check: $(VENV)/.done
	for version in 3.6.0 3.9.0; do \
		test -d $(VENV)/triton-$$version || \
			$(BIN)/pip install --quiet --no-deps --target $(VENV)/triton-$$version triton==$$version || exit 1; \
		PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python kernels/benchmarks/resources.py || exit 1; \
	done
	$(BIN)/python kernels/benchmarks/resources.py

figures: $(VENV)/.done
	$(BIN)/python -m paper_figures --out paper_figures/rendered

clean:
	rm -rf $(VENV) $(DEMO)
