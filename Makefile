# Everything runs in .venv, which `make install` makes from the lock.
PYTHON      ?= python3
PORT        ?= 8080
INGEST_PORT ?= 8081

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Stamps: each is younger than what was installed, and its prerequisites are what went into it.
LOCKED    := .venv/.locked
PRIVYSEAL := .venv/.privyseal
VERIFIER  := .venv/.verifier

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test check bench faults screenshots openapi lock clean

help: ## Show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(PRIVYSEAL) $(VERIFIER) ## Make .venv from the lock (PYTHON=python3, at least 3.11)

$(LOCKED): requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Privyseal needs Python 3.11 or later, and $(PYTHON) is none: make install PYTHON=python3.13" >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { \
	  echo "$(PYTHON) cannot make an environment. On Debian: apt-get install python3-venv" >&2; \
	  exit 1; }
	@echo "Installing what requirements-dev.lock names into .venv: once, a minute or two"
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@touch $@

$(PRIVYSEAL): $(LOCKED) pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VERIFIER): $(LOCKED) deploy/verifier/pyproject.toml deploy/verifier/README.md $(wildcard keys/verifier/*.py)
	@$(PIP) install --no-deps --no-build-isolation --force-reinstall ./deploy/verifier
	@touch $@

run: install ## Start authority and example ingest service (PORT=8080 INGEST_PORT=8081)
	@$(BIN)/python deploy/run.py --port $(PORT) --ingest-port $(INGEST_PORT)

# Playwright's event loop stays in its process to the end: the pages are tested in one of their own.
test: install ## Run all tests; those that this machine cannot run say why
	$(BIN)/pytest --durations=20 -n 2 tests/unit tests/store tests/http
	$(BIN)/pytest --durations=20 tests/interop tests/faults
	$(BIN)/pytest --durations=20 tests/browser

check: install ## Lint, format, types, imports, Dockerfile, openapi.yaml
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/python deploy/openapi.py | diff -u openapi.yaml - || { echo "Run: make openapi" >&2; exit 1; }

bench: install ## Measure exchanges, the console and a log of 10 million records: 25 minutes
	$(BIN)/python -m tests.bench.bench
	$(BIN)/python -m tests.bench.sequencer_bench
	$(BIN)/python -m tests.bench.verify_bench
	$(BIN)/python -m tests.bench.audit_bench
	$(BIN)/python -m tests.bench.console_bench

faults: install ## Kills, wrong clocks, 50 rotations under load: the long forms, 20 minutes
	FAULTS_LONG=1 $(BIN)/pytest --durations=20 tests/faults

screenshots: install ## A picture of every page of the console, under var/screenshots/
	$(BIN)/pytest -q tests/browser/take_screenshots.py

openapi: install ## Write openapi.yaml from the code
	$(BIN)/python deploy/openapi.py > openapi.yaml.new
	mv openapi.yaml.new openapi.yaml

LOCK := uv pip compile --quiet --universal --generate-hashes --python-version 3.11 \
        --no-emit-index-url --no-header

lock: ## Write the locks from pyproject.toml (uv is not among them: pip install uv)
	@command -v uv >/dev/null || { echo "uv is missing: pip install uv" >&2; exit 1; }
	$(LOCK) --extra hsm --output-file requirements.lock pyproject.toml
	$(LOCK) --extra dev --output-file requirements-dev.lock pyproject.toml

clean: ## Remove .venv and caches; var/, with its keys and records, stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .schemathesis .import_linter_cache
	rm -rf tests/interop/node/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
