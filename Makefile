# The habits, one word each. Every target makes the environment first if it is missing or out of date.

PYTHON := .venv/bin/python

# Native builds look for ninja on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup test check bench

setup:
	@./launch.sh --setup-only

# One thread: tests start several ranks at once, and tiny tensors gain nothing from more.
test: export OMP_NUM_THREADS ?= 1
test: setup
	$(PYTHON) -m pytest

check: setup
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

bench: setup
	$(PYTHON) -m pipeline bench throughput
