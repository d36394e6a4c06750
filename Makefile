# Stillpoint. `make` alone lists the targets.
VENV := .venv
BIN := $(VENV)/bin
# The environment is made again only when the list of what it holds has changed.
INSTALLED := $(VENV)/.installed

SOURCES := stillpoint primary standby backupnode tests benchmarks deploy
PACKAGES := stillpoint primary standby backupnode tests $(patsubst %/__init__.py,%,$(wildcard benchmarks/__init__.py))

.DEFAULT_GOAL := help
.PHONY: help demo test check torture fuzz proto image bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(INSTALLED) ## the main job on real input: mirror, snapshot, backup, restore, compare
	@deploy/ci/system-tools.sh demo
	$(BIN)/standbyctl demo

test: $(INSTALLED) ## every test this machine can run; says what it leaves out
	@deploy/ci/system-tools.sh test
	deploy/ci/with-docker.sh deploy/ci/run-tests.sh $(BIN)/pytest

check: $(INSTALLED) ## style, types, boundaries and the quick tests: before each commit
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/unit tests/conformance tests/golden

torture: $(INSTALLED) ## random lives of snapshots, copies and failovers for SECONDS=300, from a seed of its own or SEED=N
	$(BIN)/python -m tests.simulation.torture --seconds $(or $(SECONDS),300) $(if $(SEED),--seed $(SEED))

fuzz: $(INSTALLED) ## search for input that breaks a parser, led by coverage, for SECONDS=300: PARSER="nbd replies"
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz.guided $(or "$(PARSER)",catalog) -max_total_time=$(or $(SECONDS),300)

proto: $(INSTALLED) ## generate the gRPC code from proto/ again
	$(BIN)/python deploy/ci/generate_stubs.py

image: $(INSTALLED) ## build the container image (IMAGE=stillpoint:latest, BASE_IMAGE=…)
	deploy/compose/build-image.sh

bench: $(INSTALLED) ## side-by-side runs against other software
	@deploy/ci/system-tools.sh bench
	$(BIN)/python -m benchmarks

clean: ## remove what the other targets made, the environment included
	rm -rf $(VENV) build dist stillpoint.egg-info deploy/compose/wheels .demo
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	deploy/ci/venv.sh $(VENV)
	@touch $@
