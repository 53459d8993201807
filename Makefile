# One virtual environment in .venv; every target sets it up first when it is missing.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BROWSER := $(VENV)/.browser
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# of pip's output what a person wants to see: how far it is, the large downloads, errors
PIP_PROGRESS := awk '\
	/^Collecting/ { if (++found % 25 == 0) print "  " found " packages found" } \
	/Downloading .*\([0-9.]+ MB\)/ { size = $$0; sub(/.*\(/, "", size); if (size + 0 > 50) print "  " $$1 " " $$2 " (" size } \
	/^Installing collected/ { print "  installing " NF - 3 " packages" } \
	/^ *(ERROR|error)/ { print } { fflush() }'

# two halves of the suite at once, each with a Ray of its own; the tests of a file stay together
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup setup-gpu demo test test-all lint bench serve clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) $(BROWSER) ## create .venv with everything pinned (a few minutes, several GB: the CUDA build serves CPU machines too)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install --constraint constraints.txt --editable ".[dev]" 2>&1 | $(PIP_PROGRESS)
	@touch $@

# The page is tested in a real browser: one that is there, or Debian's where this user may install it.
$(BROWSER): $(STAMP) tests/browser.py
	@$(BIN)/python tests/browser.py && touch $@ || true

setup-gpu: $(STAMP) ## swap faiss-cpu for faiss-gpu (one module name, so never both)
	@$(BIN)/pip uninstall --quiet --yes faiss-cpu
	@$(BIN)/pip install --constraint constraints.txt faiss-gpu==1.15.1 2>&1 | $(PIP_PROGRESS)

demo: $(STAMP) ## from raw audio to a live answer on the generated corpus, then stop everything
	$(BIN)/python ray_jobs/demo.py --out demo

# Where Python may not write bytecode (PYTHONDONTWRITEBYTECODE) each of the suite's hundreds of processes would compile ours.
BYTECODE := $(BIN)/python -m compileall -q audiomae ray_jobs serve tests

test: $(STAMP) $(BROWSER) ## the default suite (under 12 minutes on 2 cores)
	@$(BYTECODE)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: $(STAMP) $(BROWSER) ## everything, the slow chaos and scale tests included
	@$(BYTECODE)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "slow or not slow" --timeout 1800

lint: $(STAMP) ## ruff, types, import rules, declared dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

bench: $(STAMP) ## every measurement side by side; JSON lands in docs/benchmarks
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; \
		$(BIN)/python $$script || test $$? = 77 || exit 1; done  # 77: this machine has no GPU

serve: $(STAMP) ## serve the demo's index on http://127.0.0.1:8000
	$(BIN)/serve run serve.app:build index=demo/trained/index

clean: ## remove what the demo and the tools wrote (not .venv)
	rm -rf demo runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
