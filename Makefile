# `make demo` and `make test` do their own set-up in .venv; they need Python 3.11 or newer and make.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# The wheel carries the model that tests/ serve; the torch that it asks for is not needed for that.
SILERO := silero-vad==6.2.3

.PHONY: demo test check clean

demo: .venv/ready-to-run  ## a real ECG through a real server, in about a minute
	$(BIN)/murmur demo

test: check  ## all that a pull request must pass
	$(BIN)/python -m pytest

check: .venv/ready-to-test  ## linters and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

.venv/ready-to-run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing murmur into .venv"
	$(INSTALL) --editable '.[cpu,ecg]'
	@touch $@

.venv/ready-to-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing murmur and what its tests need into .venv; torch takes a while"
	$(INSTALL) --editable '.[cpu,ecg,export,train,dev]'
	$(INSTALL) --no-deps $(SILERO)
	@touch .venv/ready-to-run $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
		sys.exit(sys.version_info < (3, 11) and f"murmur needs Python 3.11 or newer, found {v}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
