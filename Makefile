# Everything a newcomer or a CI machine runs. Needs Python 3.11 or newer and make.
PYTHON ?= $(shell for v in 3.12 3.11 3.13; do p=$$(command -v python$$v) && $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
WORKDIR ?= /tmp/vit_jax_demo
# Test processes. The tests of one file stay together, and files start in the order that
# tests/conftest.py gives them: those with few tests are not the short ones.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install demo check test lint types format docs check-python

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt | check-python
	@echo "install      downloads about 1.3 GB into .venv, where it takes 3.5 GB: some minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' & pip=$$!; \
	while sleep 15; kill -0 $$pip 2>/dev/null; do echo "install      $$(du -sm .venv | cut -f1) MB so far"; done; wait $$pip
	@touch $@

check-python:
	@test -n "$(PYTHON)" || { echo "error: no python3.11, 3.12 or 3.13 found: install one or give make PYTHON=/path/to/python"; exit 1; }

demo: install
	@$(BIN)/python -m vit_jax.main --config=configs/digits.py --workdir=$(WORKDIR)

# Before every commit: under two minutes.
check: lint types
	$(PYTEST) -q -m "not process and not heavy and not slow and not tpu and not gpu"

test: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

# The pages of docs/ as a site, in build/site; any warning is an error.
docs: install
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
