# The habits, one word each. Every target makes the environment first if it is missing or out of date.

# What PYTHON=... names makes the environment; everything else runs in it.
BASE_PYTHON := $(or $(PYTHON),python3)
override PYTHON := .venv/bin/python

# Native builds look for ninja on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup test check bench docs gpu accept

setup:
	@PYTHON=$(BASE_PYTHON) ./launch.sh --setup-only

# One thread: tests start several ranks at once, and tiny tensors gain nothing from more. What starts ranks runs apart, in
# two processes: more would keep ranks waiting for a core, and one leaves cores idle while a launcher waits. The order of
# files is that of tests/conftest.py.
test: export OMP_NUM_THREADS ?= 1
# A hundred processes import the same modules: bytecode is kept, also where the shell forbids it.
test: export PYTHONDONTWRITEBYTECODE :=
test: setup
	@$(PYTHON) -m pytest --ignore tests/launch -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder; others=$$?; \
	$(PYTHON) -m pytest tests/launch -n 2 --dist loadfile --no-loadscope-reorder && exit $$others

check: setup
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

# `check` and `test` with the lowest versions that setup.py allows, in a copy of the tree: the environment and the
# native libraries here are those of constraints.txt.
.PHONY: lowest
lowest:
	@mkdir -p .lowest
	@find .lowest -path .lowest/.venv -prune -o -path .lowest/build -prune -o -type f ! -name '_native_*' -exec rm {} +
	@git ls-files -z --cached --others --exclude-standard | tar --null --files-from - --create | tar --extract -C .lowest
	@test -x .lowest/.venv/bin/uv || \
	{ $(BASE_PYTHON) -m venv .lowest/.venv && .lowest/.venv/bin/python -m pip install --quiet uv; }
	@cd .lowest && .venv/bin/uv pip compile --quiet --resolution lowest-direct --no-header --no-annotate \
	--python .venv/bin/python setup.py --extra dev >lowest.txt && mv lowest.txt constraints.txt
	@$(MAKE) -C .lowest --keep-going check test

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
