# The front door. Everything runs in .venv (test-oldest in .venv-oldest), which the first target that needs it makes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

# A Python that the user names is the only one tried; otherwise the first that is new enough.
ifeq ($(origin PYTHON),file)
CANDIDATES := $(PYTHON) python3.13 python3.12 python3.11 python3.10
else
CANDIDATES := $(PYTHON)
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart browser sandbox test test-oldest docs image-check lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=...        the Python to make .venv with (3.10 or newer)"

quickstart: $(VENV)/.installed ## install, then train a small model of experts on this machine
	$(BIN)/dylora train --config recipes/quickstart.yaml

browser: ## install the headless browser that the test of the report's page needs (Debian, as root)
	@command -v chromium-headless-shell || command -v chromium || command -v google-chrome || \
	    { test "$$(id -u)" = 0 && apt-get update && apt-get install -y --no-install-recommends chromium-headless-shell; } || \
	    { echo "Install Chromium or Chrome by your system's means, or run this as root on Debian." >&2; exit 1; }

sandbox: ## install bubblewrap, which isolates generated code (Debian or Ubuntu, as root)
	@command -v bwrap >/dev/null || \
	    { test "$$(id -u)" = 0 && apt-get update && apt-get install -y --no-install-recommends bubblewrap; } || \
	    { echo "bubblewrap is not installed: install it by your system's means, or run this as root on Debian." >&2; exit 1; }

test: lint ## everything that CI checks: lint, types and tests; ends with the table of the laws
	-@$(MAKE) --no-print-directory sandbox # without it, what needs isolation is skipped, and counted so
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --laws

test-oldest: $(OLDEST)/.installed-dev ## the tests on the oldest supported versions, in a .venv-oldest of their own
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2

docs: $(VENV)/.installed-docs ## build the documentation as a site, in the folder site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

image-check: $(VENV)/.made ## run the container image's own install steps and entry point in a fresh environment
	$(BIN)/python benchmarks/deployment/image_check.py

lint: $(VENV)/.installed-dev ## check style and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, .venv-oldest, caches and build leftovers; runs/ stays
	rm -rf $(VENV) $(OLDEST) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps keep an install from being repeated until what it depends on changes.
$(VENV)/.made $(OLDEST)/.made:
	@for python in $(CANDIDATES); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	        $$python -m venv $(@D) && touch $@; exit; \
	    fi; \
	done; \
	echo "No usable Python among: $(CANDIDATES). It must be 3.10 or newer and have venv and pip" \
	    "(on Debian: python3-venv). Name another one with: make PYTHON=/path/to/python" >&2; \
	exit 1

$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(VENV)/.made
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml setup.py constraints.txt | $(VENV)/.made
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,trl]"
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/python -m pip install -c constraints.txt -e ".[docs]"
	@touch $(VENV)/.installed $@

$(OLDEST)/.installed-dev: pyproject.toml setup.py constraints-oldest.txt | $(OLDEST)/.made
	$(OLDEST)/bin/python -m pip install -c constraints-oldest.txt -e ".[dev]"
	@touch $@
