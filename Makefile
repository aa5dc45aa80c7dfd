# `make demo` runs the main job on real data, `make test` checks everything; both set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types unit test-slow docs format setup wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("dpbudget needs Python 3.11 or newer, this is %d.%d; set PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python docs/examples/digits.py

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Long tests in shards, each well under half an hour on two cores; `make test-slow-trainer` runs one of them.
SLOW_core := tests/attacks tests/cli tests/docs tests/dpbudget tests/house tests/reference
SLOW_trainer := tests/dptrainer
SLOW_judges := tests/fuzz tests/peers
SLOW := core trainer judges

test-slow: $(SLOW:%=test-slow-%)

test-slow-%: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 1800 -n 2 --dist worksteal $(SLOW_$*)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(STAMP)
	$(BIN)/python -m build --quiet --outdir dist .

clean:
	rm -rf $(VENV) dist build site .mypy_cache .ruff_cache .pytest_cache
