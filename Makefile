# One command a task. Each sets up .venv first, so that any of them works on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PARTS := steps-small
DEVICE := cpu

.PHONY: setup demo test ptx pretended-gpu lint types audit docs bench

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

# One process has Triton's interpreter switched on, in another kernels are compiled; the last runs the examples of docstrings.
test: $(INSTALLED)
	$(BIN)/pytest --numprocesses 2 --dist worksteal --hypothesis-profile=ci --benchmark-disable
	FUSED_CLR_TEST_PTX=90 $(BIN)/pytest tests/ptx -m ptx --numprocesses 2 --dist worksteal
	$(BIN)/pytest -p tests.conftest --doctest-modules fused_clr --ignore=fused_clr/kernels

# The second for two capabilities and other orders of warps, and the comparisons with torch on compiled kernels.
COMPARISONS := parity clipping skipping replay captures
ptx: $(INSTALLED)
	for capability in 80 90; do \
		export FUSED_CLR_TEST_PTX=$$capability; \
		for seed in 1 2; do \
			FUSED_CLR_TEST_PTX_SEED=$$seed $(BIN)/pytest tests/ptx -m ptx --numprocesses 2 --dist worksteal || exit; \
		done; \
		$(BIN)/pytest $(COMPARISONS:%=tests/parity/test_%.py) --numprocesses 2 --dist worksteal || exit; \
	done

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/codespell

types: $(INSTALLED)
	$(BIN)/mypy

audit: $(INSTALLED)
	$(BIN)/python -m tests.audit

# The site, into out/site. A link that leads nowhere is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'to read it: $(BIN)/python -m http.server --directory out/site'

# Results into bench/results, as tables and pictures too: make bench PARTS="steps-small host" ROUNDS=21
bench: $(INSTALLED)
	for part in $(PARTS); do \
		$(BIN)/pytest bench --part $$part $(if $(ROUNDS),--rounds $(ROUNDS)) --device $(DEVICE) \
			--benchmark-json=bench/results/$$part-$(DEVICE).json || exit; \
		$(BIN)/python -m bench.report bench/results/$$part-$(DEVICE).json || exit; \
	done

# In an environment of its own, under .pretended-gpu: gigabytes.
pretended-gpu:
	$(PYTHON) -m tests.pretended_gpu.build
