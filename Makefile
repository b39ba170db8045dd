# Each target works from a bare clone with Python 3.11 to 3.14: it makes .venv, installs pinned versions, and runs.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup update demo test test-slow lint format bench-peers gpu-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	@PYTHON="$(PYTHON)" sh tools/setup.sh $(VENV)
	@touch $(STAMP)

# The newest versions that pyproject.toml allows, for every platform and Python, into constraints.txt.
update: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --upgrade --universal --python-version 3.11 --extra dev --extra serve --extra verify \
	    --no-annotate --no-emit-index-url --custom-compile-command "make update" --quiet \
	    --output-file constraints.txt pyproject.toml

demo: $(STAMP)
	$(BIN)/penstock demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-peers: $(STAMP)
	$(BIN)/python -m benchmarks peers

gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks gpu

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
