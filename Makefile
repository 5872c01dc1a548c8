# The commands of the project. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
LOCK_VENV := build/lock
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DO_NOT_TRACK := 1

# A process per core, each of one thread; no more than eight, for the memory that each takes.
TESTS := OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# The first Python that fits and can make an environment; PYTHON=... chooses another.
FIND_PYTHON = for name in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	if "$$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	  python="$$name"; break; fi; done; \
	if [ -z "$${python:-}" ]; then \
	  echo "make: no Python 3.11, 3.12 or 3.13 with venv found; install one (Debian: apt-get install python3-venv), or give PYTHON=/path/to/python3.11" >&2; \
	  exit 1; fi

.PHONY: help run test check format deps lock install workspace

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 12

run: install workspace  ## install, run the pipeline on params.yaml, print the verdict and what to do next
	@dvc repro
	@echo
	@tda verdict

test: install  ## install, run the tests
	@$(TESTS)

check: install  ## format check, lint, tests
	@ruff format --check .
	@ruff check .
	@$(TESTS)

format: install  ## format the code, mend what lint can mend
	@ruff format .
	@ruff check --fix .

deps: install  ## set the module and parameter lists of dvc.yaml to what the code uses
	@python -m flows.deps --write

lock: ## resolve pyproject.toml in a new environment and write requirements.lock
	@rm -rf $(LOCK_VENV) && mkdir -p $(dir $(LOCK_VENV))
	@$(FIND_PYTHON); "$$python" -m venv $(LOCK_VENV)
	@$(LOCK_VENV)/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")' > $(LOCK_VENV)/wanted.txt
	@$(LOCK_VENV)/bin/python -m pip install --quiet -r $(LOCK_VENV)/wanted.txt
	@$(LOCK_VENV)/bin/python -m pip check
	@$(LOCK_VENV)/bin/python -m pip freeze | grep -E '^[A-Za-z0-9._-]+==' | sed -E 's/\+.*//' > requirements.lock
	@echo "requirements.lock: $$(wc -l < requirements.lock) packages"

# Installs only if the lock or the project's metadata changed since, by content: a checkout changes times.
install:
	@if ! cat requirements.lock pyproject.toml 2>/dev/null | cmp -s - $(VENV)/installed || ! $(VENV)/bin/python -c '' 2>/dev/null; then \
	  $(FIND_PYTHON); \
	  if ! $(VENV)/bin/python -c '' 2>/dev/null; then rm -rf $(VENV); "$$python" -m venv $(VENV); fi; \
	  echo "Installing $$(wc -l < requirements.lock) pinned packages into $(VENV): once, a few minutes"; \
	  quiet=--quiet; if [ -t 1 ]; then quiet=; fi; \
	  $(VENV)/bin/python -m pip install $$quiet -r requirements.lock; \
	  $(VENV)/bin/python -m pip install --quiet --no-deps --editable .; \
	  cat requirements.lock pyproject.toml > $(VENV)/installed; \
	fi

# An unpacked archive has no git; DVC is told so, and told otherwise again when there is one.
workspace:
	@if [ ! -e .git ]; then dvc config --local core.no_scm true; \
	elif grep -qs no_scm .dvc/config.local; then dvc config --local --unset core.no_scm; fi
