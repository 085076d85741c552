# Python 3.11 or newer and make are all that this needs. Everything else goes into .venv, pinned and hashed.

.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:

# The first of these that is new enough and can make a venv; `make PYTHON=/path/to/python` chooses another.
PYTHONS := python3.11 python3.12 python3.13 python3
PYTHON :=

VENV := .venv
BIN := $(VENV)/bin
# buf calls its plugins by name, and tests call grpcurl by name. Not for `run`, which prints lines for another terminal.
test check-generated check-schema generate: export PATH := $(CURDIR)/$(BIN):$(PATH)

PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-package afterhours-grpc --custom-compile-command "make lock"

# More for the command behind a target, such as `make test ARGS="-k races -x"` or `make run ARGS="--listen [::1]:0"`.
ARGS :=

.PHONY: help
help: ## List the targets
	@echo "usage: make TARGET [ARGS=…]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: run
run: $(VENV)/installed ## Start the service on a Postgres and a Redis of its own; Ctrl-C stops it
	@exec $(BIN)/afterhours-grpc dev $(ARGS)

.PHONY: test
test: $(VENV)/installed ## Run every test, on real engines; ARGS runs some, one at a time
ifeq ($(ARGS),)
	@failed=0; \
	$(BIN)/pytest --numprocesses 3 --dist loadfile -m "not timed and not alone" || failed=1; \
	$(BIN)/pytest --numprocesses 3 --dist loadfile -m timed || failed=1; \
	$(BIN)/pytest -m alone || failed=1; \
	exit $$failed
else
	@$(BIN)/pytest $(ARGS)
endif

.PHONY: check
check: check-protos check-generated check-style check-types check-imports check-schema ## Check everything but the behaviour

.PHONY: check-protos
check-protos: $(VENV)/installed
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against protos/baseline.json

# Against the working tree, so that a change and what is generated from it pass before they are committed.
.PHONY: check-generated
check-generated: $(VENV)/installed
	@echo "buf generate, and compare with generated/"
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(BIN)/buf generate --output "$$fresh" && \
	diff -r --exclude=__pycache__ --exclude=typescript generated "$$fresh/generated" && \
	{ tools/generate_typescript.sh "$$fresh/typescript" || [ $$? = 3 ]; } && \
	{ [ ! -d "$$fresh/typescript" ] || diff -r generated/typescript "$$fresh/typescript"; } || \
	{ echo "generated/ is not what the protos give: run \`make generate\`" >&2; exit 1; }

.PHONY: check-style
check-style: $(VENV)/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check

.PHONY: check-types
check-types: $(VENV)/installed
	$(BIN)/mypy

.PHONY: check-imports
check-imports: $(VENV)/installed
	$(BIN)/lint-imports --no-logo

.PHONY: check-schema
check-schema: $(VENV)/installed
	$(BIN)/pytest --quiet tests/test_schema.py

# What `make bench` compares with: etcd and what the load generator is built of by apt-get, the Node peer's packages by npm.
.PHONY: bench-setup
bench-setup: ## Install what the bench compares with, on Debian as root
	apt-get install --yes --no-install-recommends gcc libc6-dev libnghttp2-dev etcd-server
	cd bench/peers/express && npm install --no-package-lock --no-audit --no-fund

.PHONY: bench
bench: $(VENV)/installed bench/build/load ## Measure the calls beside what they are compared with; some ten minutes
	@$(BIN)/python bench/run.py $(ARGS)

.PHONY: bench-growth bench-hotpath bench-soak
bench-growth bench-hotpath bench-soak: bench-%: $(VENV)/installed bench/build/load
	@$(BIN)/python bench/$*.py $(ARGS)

bench/build/load: bench/load/load.c
	@mkdir -p $(@D)
	@$(CC) -O2 -std=gnu11 -Wall -Wextra -o $@ $< -lnghttp2 || \
	{ echo "make: the load generator needs a C compiler and libnghttp2's headers: run \`make bench-setup\`" >&2; exit 1; }

.PHONY: bench-storm
bench-storm: $(VENV)/installed ## Measure 10,000 sessions that are due in one second
	@$(BIN)/python bench/storm.py $(ARGS)

.PHONY: chaos
chaos: $(VENV)/installed ## Break three replicas and their engines under load for two minutes; check what callers saw
	@$(BIN)/python tests/chaos.py $(ARGS)

.PHONY: generate
generate: $(VENV)/installed ## Make generated/ from protos/; its TypeScript where there is npm
	@rm -rf generated/afterhours && $(BIN)/buf generate
	@tools/generate_typescript.sh generated/typescript || [ $$? = 3 ]

.PHONY: baseline
baseline: $(VENV)/installed ## At a release: take protos/ as what later ones must not break
	@$(BIN)/buf build --exclude-source-info --output -#format=json | $(BIN)/python -m json.tool > protos/baseline.json

.PHONY: lock
lock: $(VENV)/installed ## Pin what pyproject.toml asks for; ARGS=--upgrade takes the newest
	@$(LOCK) $(ARGS) --extra dev pyproject.toml --output-file requirements/dev.txt
	@$(LOCK) --extra server --constraint requirements/dev.txt pyproject.toml --output-file requirements/server.txt
	@printf '%s\n' editables hatchling setuptools | \
	$(LOCK) --constraint requirements/dev.txt - --output-file requirements/build.txt

# Advisories are asked over the network, so that it is no part of `check`.
.PHONY: audit
audit: $(VENV)/installed ## Ask PyPI for known vulnerabilities in what requirements/server.txt pins
	$(BIN)/uv tool run pip-audit@2.10.1 --strict --disable-pip --require-hashes --requirement requirements/server.txt

.PHONY: clean
clean: ## Remove .venv and the tools' caches
	@rm -rf $(VENV) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find afterhours_grpc bench generated tests tools -name __pycache__ -prune -exec rm -r {} +

# build.txt comes first: what there is no wheel of is built by what is pinned, too.
$(VENV)/requirements: requirements/build.txt requirements/dev.txt
	@python=; for each in $(or $(PYTHON),$(PYTHONS)); do \
		"$$each" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
		python=$$each && break; \
	done; \
	[ "$$python" ] || { echo "make: none of '$(or $(PYTHON),$(PYTHONS))' is a Python of 3.11 or newer that can make" \
		"a venv: install one (on Debian python3 and python3-venv), or name it by PYTHON=" >&2; exit 1; }; \
	echo "make: installing into $(VENV) for $$python, once: a minute or so" >&2; \
	rm -rf $(VENV) && "$$python" -m venv $(VENV)
	@$(PIP) install --require-hashes --requirement requirements/build.txt
	@$(PIP) install --require-hashes --no-build-isolation --requirement requirements/dev.txt
	@touch $@

$(VENV)/installed: $(VENV)/requirements pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
