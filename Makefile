# One command per task. `make setup PY=/path/to/python3.11` chooses the interpreter of the virtual environment.
PY ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
# Processes that share the tests; each takes one thread of torch.
JOBS ?= 2

.DEFAULT_GOAL := setup
.PHONY: setup quickstart test chaos check lint types format lock

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "objdyn needs Python 3.11 or newer: make setup PY=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python jobs/quickstart.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Kills, fills, cuts off and starves the stages in earnest, and prints what survived: half an hour.
chaos: $(STAMP)
	$(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder -m chaos tests/chaos $(ARGS)

check: lint types test

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# Pins every dependency again from a fresh environment; commit the result. The local version (+cpu) is dropped, so that
# the same pins also hold on a machine with a GPU.
lock:
	rm -rf .lock
	$(PY) -m venv .lock
	.lock/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	.lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt
	rm -rf .lock
