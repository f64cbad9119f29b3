# Two commands set everything up: `make demo` runs the main job on the embedded world, `make test` checks everything.
# They need Python 3.11 or newer with venv and pip, and nothing else; packages come from wherever pip is set up to look.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Small models are slower with more threads on a busy machine (OpenMP waits by spinning); two test workers use the two cores better.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
TEST_WORKERS ?= 2

.PHONY: help demo test lint format install install-dev vllm clean

help:
	@echo "make demo     environment, install, and the main job on the embedded world (results in runs/demo)"
	@echo "make test     environment, install, lint, types, all tests"
	@echo "make lint     ruff and mypy only"
	@echo "make vllm     vLLM's CPU build beside it, for rollout.engine: vllm (Linux x86-64; on a GPU: pip install 'srppo[vllm]')"
	@echo "make format   rewrite the Python files in the project's format"
	@echo "make clean    remove the environment, caches and build files (runs/ and data/ stay)"

demo: install
	@$(BIN)/srppo demo --seed 0 --output runs/demo --overwrite

test: lint
	@echo "== tests ($(TEST_WORKERS) workers)"
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

lint: install-dev
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy

format: install-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.created:
	@echo "== environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"srppo needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; name another: make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# pip's words go to a log; a line a package is shown, and the end of the log if it fails.
define pip_install
	@echo "== install $(1) at the versions of constraints.txt (some minutes the first time; log in $(VENV)/install.log)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt --editable '$(1)' 2>&1 \
		| tee $(VENV)/install.log | { grep --line-buffered -oE '^ *(Collecting|Installing collected packages|Successfully installed|ERROR:.*)( [^ ]*)?' || true; } \
		|| { tail -n 25 $(VENV)/install.log >&2; echo "the installation failed; the whole log is $(VENV)/install.log" >&2; exit 1; }
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	$(call pip_install,.)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(call pip_install,.[dev])
	@touch $(VENV)/.installed $@

vllm: $(VENV)/.installed-vllm

# --no-deps, so that nothing replaces the torch that is there
$(VENV)/.installed-vllm: constraints-vllm.txt | $(VENV)/.installed
	@echo "== install vLLM's CPU build at the versions of constraints-vllm.txt (log in $(VENV)/install-vllm.log)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-deps --requirement constraints-vllm.txt \
		> $(VENV)/install-vllm.log 2>&1 || { tail -n 25 $(VENV)/install-vllm.log >&2; exit 1; }
	@$(BIN)/python -W ignore -c 'import vllm; from vllm import LLM; print("vLLM", vllm.__version__)'
	@touch $@

clean:
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	@find src tests recipes benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	@echo "removed the environment, caches and build files"
