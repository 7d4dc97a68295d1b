# Every target creates .venv if needed and installs again only after pyproject.toml has changed.

# Set on the command line only: some shells export HOST with another meaning.
HOST := 127.0.0.1
PORT := 8000
MODEL :=
ARGS :=
ONLY :=
PYTHON ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The tests of `make test-fast`, without those that are marked as slow.
FAST := tests/engine/scheduling tests/training/data tests/training/report \
	$(filter-out tests/model/test_parity.py tests/model/test_quantization.py, \
	$(wildcard tests/test_[ceps]*.py tests/cli/test_[cln]*.py tests/deploy/test_[acps]*.py \
	tests/model/test_*.py tests/training/test_c*.py))
# The tests of `make test-arm`: what differs on ARM, and one path through all layers.
KERNELS := tests/model/kernels
ARM := $(addprefix $(KERNELS)/,build/test_arm.py build/test_peak.py forward/test_kernels.py) \
	tests/engine/test_engine.py::test_bits_do_not_depend_on_the_batch \
	tests/server/openai/test_completions.py::test_the_official_client_gets_a_completion
# One stamp file per set of extras; a larger set includes the smaller ones.
RUN := $(VENV)/.installed-run
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help install serve test test-fast test-arm fuzz check format bench compare
.PHONY: compare-training charts soak attack clients notebooks docs screenshots ray image
.PHONY: constraints wheel kernel-wheel build clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' \
		$(firstword $(MAKEFILE_LIST))

install: $(RUN)  ## install nanovllm into .venv

serve: $(RUN)  ## serve a model; HOST=127.0.0.1 PORT=8000 MODEL=folder-or-name ARGS="more flags"
	@exec $(BIN)/nanovllm serve $(if $(MODEL),"$(MODEL)") --host "$(HOST)" --port "$(PORT)" $(ARGS)

# Hundreds of processes that the tests start read the bytecode that the first one writes.
test: $(TEST)  ## run the tests on all cores; ARGS="tests/engine -k preempt" for a part of them
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(or $(ARGS),-n auto)

test-fast: $(TEST)  ## run the tests that need neither a server nor kernels, in under a minute
	@$(BIN)/python -m pytest -n auto -m "not slow" $(FAST)

test-arm: | $(BIN)/python  ## run a part of the tests on an emulated ARM (four minutes, on Debian)
	@PYTHON=$(BIN)/python scripts/arm_python.sh .arm
	@.arm/bin/python -m pytest $(or $(ARGS),-n auto --dist worksteal $(ARM))

fuzz: $(TEST)  ## send valid and invalid requests to a server; ARGS="--seconds 3600 --seed 7"
	@$(BIN)/python -m tests.support.fuzz_grammars --seconds 60
	@$(BIN)/python -m tests.support.fuzzing $(ARGS)

check: $(DEV)  ## check style, format, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	tools/javascript/check.sh

format: $(DEV)  ## format the code and sort the imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .
	tools/javascript/check.sh --write

bench: $(RUN)  ## measure prefill and decode speed; MODEL=folder-or-name ARGS="more flags"
	@$(BIN)/nanovllm bench latency $(if $(MODEL),"$(MODEL)") $(ARGS)

compare: $(RUN)  ## compare with other engines (docs/maintainers/measurements.md); ARGS="--peers llamacpp,vllm"
	@$(BIN)/python benchmarks/compare.py $(if $(MODEL),--model "$(MODEL)") $(ARGS)

compare-training: $(RUN)  ## compare training with PyTorch; ARGS="--torch-python PATH"
	@$(BIN)/python benchmarks/training.py $(ARGS)

charts: $(RUN)  ## draw the comparison chart and record the terminal session of the README
	@$(BIN)/python tools/comparison_chart.py
	@$(BIN)/python tools/terminal_session.py

screenshots: $(DEV)  ## take the pictures of the inspector; ARGS="--only engine --no-animation"
	@$(BIN)/python tools/screenshots.py $(ARGS)

soak: $(TEST)  ## overload and attack a server for ten minutes; ARGS="--minutes 1"
	@$(BIN)/python -m tests.load.server_soak --attacks all $(ARGS)

attack: $(TEST)  ## run known attacks against a server; ARGS="--only bad-words,chunks"
	@$(BIN)/python -m tests.load.attack_server $(ARGS)

clients: $(TEST)  ## run client libraries, write docs/reference/clients.md; ONLY=litellm,openai
	@$(BIN)/python -m tests.clients.run --only "$(ONLY)"

notebooks: $(RUN)  ## run the notebooks of the course and store their outputs; ARGS="inside_a_gpt"
	@$(PIP) -e ".[notebooks]"
	@$(BIN)/python -m tools.notebooks $(ARGS)

docs: $(RUN)  ## build the documentation into site/; REPO_URL=address for links to source files
	@$(PIP) -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 REPO_URL="$(REPO_URL)" $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html is built"

ray: $(RUN)  ## serve two replicas by Ray Serve; CONFIG=examples/ray/two-replicas.yaml
	@$(PIP) -e ".[ray]"
	@$(BIN)/serve run $(or $(CONFIG),examples/ray/two-replicas.yaml)

image:  ## build the container image with docker, podman or buildah; ARGS="--build-arg EXTRAS=ray"
	@deploy/build_image.sh $(ARGS)

constraints: $(RUN)  ## renew the versions of the packages in the image, deploy/constraints.txt
	@$(PIP) uv
	@UV=$(abspath $(BIN))/uv deploy/update_constraints.sh

wheel: $(TEST)  ## build the source archive and the wheel into dist/
	@$(BIN)/python -m build --outdir dist .

kernel-wheel: $(TEST)  ## build a wheel with compiled kernels into dist/; ARGS="--levels avx2,avx512"
	@$(BIN)/python scripts/kernel_wheel.py $(ARGS)

build: wheel

clean:  ## remove .venv, caches and build results
	rm -rf $(VENV) .arm .clients dist build site tools/javascript/node_modules
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
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
	found="$$($(or $(PYTHON),python3) --version 2>&1 || true)"; \
	echo "nanovllm needs Python 3.10 or newer, but $(or $(PYTHON),python3) is $$found." >&2; \
	echo "Install one, or give its path: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1
