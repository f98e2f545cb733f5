# Two commands from a fresh clone, with Python 3.11 or newer and nothing else:
#   make demo   sets up .venv and runs the main job on generated data
#   make test   sets up .venv and passes the tests
PYTHON ?= python3
VENV ?= .venv
# Test processes that run side by side, each a file of tests at a time, long files first: most tests wait for processes
# that they start, killed or stopped ones among them, and leave the cores idle.
TEST_PROCESSES ?= 4
PY := $(VENV)/bin/python
# uv installs in a tenth of the time, where there is one.
UV ?= $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install --quiet --python $(PY),$(PY) -m pip install --quiet --disable-pip-version-check)
# Tests start many processes of this project: with its bytecode on disk each starts in half the time.
export PYTHONDONTWRITEBYTECODE =

NATIVE := $(wildcard pipeline/models/trees/native/*.[ch] build_support/*.py)

.PHONY: demo test lint docs bench clean

demo: $(VENV)/.ready
	$(PY) -m pipeline demo

test: $(VENV)/.ready-dev
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

# The site of docs/ in build/site, without network; a broken link fails.
docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(VENV)/.ready-dev
	$(PY) -m benchmarks

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml $(NATIVE) | $(PY)
	$(INSTALL) --editable '.[xgboost-cpu]'
	touch $@

$(VENV)/.ready-dev: pyproject.toml $(NATIVE) | $(PY)
	$(INSTALL) --editable '.[xgboost-cpu,dev]'
	touch $(VENV)/.ready $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
