# `make demo` and `make test` are all a fresh machine needs: Python >= 3.11 and make.
# Both make .venv if there is none. torch and torchvision must come as a pair from the same index: one pip command
# installs both, and pip's own settings (its environment variables, pip.conf) say from where.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
PY = .venv/bin/python
SPIKEGEN = .venv/bin/spikegen
DEMO = runs/demo

.PHONY: help setup demo test slow lint format types clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: .venv/.installed  ## make .venv and install spikegen with its development tools

demo: .venv/.installed  ## train on the digits, then sample, reconstruct and score (no network)
	@if [ -e $(DEMO) ] && [ ! -e $(DEMO)/.made-by-make ] && [ ! -e $(DEMO).unfinished ]; then \
		echo "make demo: $(DEMO) exists and was not made by make demo; move it away first" >&2; exit 2; fi
	@mkdir -p runs && touch $(DEMO).unfinished && rm -rf $(DEMO)
	$(SPIKEGEN) train digits --out $(DEMO)
	@mv $(DEMO).unfinished $(DEMO)/.made-by-make
	$(SPIKEGEN) sample $(DEMO) --num 64 --out $(DEMO)/samples.png
	$(SPIKEGEN) reconstruct $(DEMO) --num 32 --out $(DEMO)/reconstructions.png
	$(SPIKEGEN) score $(DEMO)
	@echo
	@echo "Samples:         $(DEMO)/samples.png"
	@echo "Reconstructions: $(DEMO)/reconstructions.png"

# Side by side, a core each: with two threads each they wait for each other, ten times as long.
test: .venv/.installed  ## run the tests (not the slow ones)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal --durations 15

slow: .venv/.installed  ## run the tests that take minutes
	$(PY) -m pytest -m slow

lint: .venv/.installed  ## ruff: lint and format, changing nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: .venv/.installed  ## ruff: fix and format
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

types: .venv/.installed  ## mypy
	$(PY) -m mypy

clean:  ## remove caches and build leftovers (not .venv, not runs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that already holds everything needs no network: that is tried first, quietly.
.venv/.installed: pyproject.toml
	@$(PY) -c '' 2>/dev/null || { \
		[ -n "$(PYTHON)" ] || { echo "make: no Python >= 3.11 found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
			echo "make: PYTHON=$(PYTHON) is no Python >= 3.11; name one: make PYTHON=/path/to/python3" >&2; exit 2; }; \
		echo "making .venv with $(PYTHON)"; "$(PYTHON)" -m venv --clear .venv; }
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: .venv holds a Python older than 3.11; remove .venv and try again" >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null || { \
		echo "make: .venv has no pip; remove .venv, install your system's venv package, try again" >&2; exit 2; }
	@$(PY) -m pip install --quiet --no-index --no-build-isolation -e '.[dev]' >/dev/null 2>&1 \
		|| { set -x; $(PY) -m pip install -e '.[dev]'; }
	@touch $@
