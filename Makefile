# One command a task. Each sets up .venv first, so that any of them works on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test lint types audit bench compat

setup: $(INSTALLED)

# torch first and alone, by exact version: resolved together with the rest, pip may fetch gigabytes of CUDA libraries even
# where a CPU build is offered.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/fused-clr demo

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses 2 --dist worksteal --hypothesis-profile=ci --benchmark-disable

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

audit: $(INSTALLED)
	$(BIN)/python -m bench.audit

bench: $(INSTALLED)
	$(BIN)/python -m bench

# In environments of its own, under .compat.
compat:
	$(PYTHON) tests/compat.py
