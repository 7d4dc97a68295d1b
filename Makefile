# Every target sets up .venv by itself and installs again only after pyproject.toml has changed.

# Given on the command line only: some shells export HOST with another meaning.
HOST := 127.0.0.1
PORT := 8000
MODEL :=
ARGS :=
ONLY :=
PYTHON ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One stamp for each set of extras; a larger set brings the smaller ones with it.
RUN := $(VENV)/.installed-run
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help serve test fuzz check format bench compare soak attack clients wheel build clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z ]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

serve: $(RUN)  ## serve a model; HOST=127.0.0.1 PORT=8000 MODEL=folder-or-name (empty: the bundled one) ARGS="more flags"
	@exec $(BIN)/nanovllm serve $(if $(MODEL),"$(MODEL)") --host "$(HOST)" --port "$(PORT)" $(ARGS)

test: $(TEST)  ## run the tests on all cores; ARGS="tests/engine -k preempt" for some of them, one after another
	@$(BIN)/python -m pytest $(or $(ARGS),-n auto)

fuzz: $(TEST)  ## send the server what its API allows and forbids; ARGS="--seconds 3600 --seed 7"
	@$(BIN)/python -m tests.support.fuzz_grammars --seconds 60
	@$(BIN)/python -m tests.support.fuzzing $(ARGS)

check: $(DEV)  ## lint, format, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(DEV)  ## format the code, sort the imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: $(RUN)  ## measure prefill and decode; MODEL=folder-or-name (empty: the bundled one) ARGS="more flags"
	@$(BIN)/nanovllm bench latency $(if $(MODEL),"$(MODEL)") $(ARGS)

compare: $(RUN)  ## compare with peers that are installed, see docs/performance.md; MODEL=folder ARGS="--peers llamacpp,vllm"
	@$(BIN)/python benchmarks/compare.py $(if $(MODEL),--model "$(MODEL)") $(ARGS)

soak: $(TEST)  ## overload and attack a server for ten minutes; ARGS="--minutes 1"
	@$(BIN)/python benchmarks/server_soak.py --attacks all $(ARGS)

attack: $(TEST)  ## attack servers, one attack after another; ARGS="--only bad-words,chunks"
	@$(BIN)/python benchmarks/attacks.py $(ARGS)

clients: $(TEST)  ## run the clients of docs/clients.md against a server, and write that page; ONLY=litellm,openai for some
	@$(BIN)/python -m tests.clients.run --only "$(ONLY)"

wheel: $(TEST)  ## build the source archive and the wheel into dist/
	@$(BIN)/python -m build --outdir dist .

build: wheel

clean:  ## remove .venv, caches and what was built
	rm -rf $(VENV) .clients dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN): pyproject.toml | $(BIN)/python
	@echo "Installing nanovllm into $(VENV)"
	@$(PIP) -e .
	@touch $@

$(TEST): pyproject.toml | $(BIN)/python
	@echo "Installing nanovllm and its test tools into $(VENV)"
	@$(PIP) -e '.[test]'
	@touch $(RUN) $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "Installing nanovllm and its development tools into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $(RUN) $(TEST) $@

$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then \
			echo "Creating $(VENV) with $$("$$python" --version)"; \
			"$$python" -m venv --clear $(VENV) && exit 0; \
			rm -rf $(VENV); \
			exit 1; \
		fi; \
	done; \
	echo "nanovllm needs Python 3.10 or newer, but $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1 || true)." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1
