# The habits, one word each. Every target makes the environment first if it is missing or out of date.

PYTHON := .venv/bin/python

# Native builds look for ninja on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup test check bench docs gpu accept

setup:
	@./launch.sh --setup-only

# One thread: tests start several ranks at once, and tiny tensors gain nothing from more. What starts ranks takes all
# cores and minds the clock, so it runs alone; the rest runs side by side.
test: export OMP_NUM_THREADS ?= 1
test: setup
	@$(PYTHON) -m pytest --ignore tests/launch -n auto --maxprocesses 8 --dist loadfile; others=$$?; \
	$(PYTHON) -m pytest tests/launch && exit $$others

check: setup
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

bench: setup
	$(PYTHON) -m pipeline bench throughput

# What pages show of a command's output, made anew.
docs: setup
	@$(PYTHON) -m tests.docs_blocks

# make gpu [STAGES="correct speed train"] [OUT=FOLDER] [WHEELS=FOLDER]. Where nothing can be downloaded there is no
# environment to set up: then the torch of python3 serves, and the kernels are built in place.
gpu:
	@$(if $(wildcard $(PYTHON)),$(PYTHON),python3) -m pipeline.bench.gpu $(STAGES)

# make accept lists long experiments; make accept NAME=x runs one.
accept: setup
	@$(PYTHON) -m tests.accept $(NAME)
