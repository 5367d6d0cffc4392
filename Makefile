# Everything a newcomer or a CI machine runs. Needs Python 3.11 or newer and make.
PYTHON ?= $(shell for v in 3.12 3.11 3.13; do p=$$(command -v python$$v) && $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
WORKDIR ?= /tmp/vit_jax_demo

.PHONY: install demo test lint types format check-python

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt | check-python
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tpu]'
	touch $@

check-python:
	@test -n "$(PYTHON)" || { echo "error: no python3.11, 3.12 or 3.13 found: install one or give make PYTHON=/path/to/python"; exit 1; }

demo: install
	$(BIN)/python -m vit_jax.main --config=configs/digits.py --workdir=$(WORKDIR)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
