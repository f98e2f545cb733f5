# Two commands from a fresh clone, with Python 3.11 or newer and nothing else:
#   make demo   sets up .venv and runs the main job on generated data
#   make test   sets up .venv and passes the tests
PYTHON ?= python3
VENV ?= .venv
# Test processes that run side by side, each a file of tests at a time.
TEST_PROCESSES ?= 2
PY := $(VENV)/bin/python
# Tests start many processes of this project: with its bytecode on disk each starts in half the time.
export PYTHONDONTWRITEBYTECODE =

NATIVE := $(wildcard pipeline/models/trees/native/*.[ch] build_support/*.py)

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	$(PY) -m pipeline demo

test: $(VENV)/.ready-dev
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.ready-dev
	$(PY) -m benchmarks

$(VENV)/.ready: pyproject.toml $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[xgboost-cpu]'
	touch $@

$(VENV)/.ready-dev: pyproject.toml $(VENV)/.ready
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[xgboost-cpu,dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
