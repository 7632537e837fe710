# Two commands do everything: `make demo` and `make test`. Set-up is part of both and quick the second time.
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-slow test-agents lint format fuzz bench clean

VENV := .venv
BIN := $(VENV)/bin

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup:  ## system packages (as root), virtual environment, the C part
	@scripts/setup

setup-dev:
	@scripts/setup --dev

demo: setup  ## the incident replayed against real walls, with an HTML report
	@$(BIN)/vallum demo

test: setup-dev  ## style, types, layers, then every test but the slow ones
	@$(MAKE) --no-print-directory lint
	@$(BIN)/pytest -m "not slow and not agents"

test-slow: setup-dev  ## the slow tests
	@$(BIN)/pytest -m "slow and not agents" --timeout 900

test-agents: setup-dev  ## the agents of others that `make test` leaves out
	@$(BIN)/python -m vallum.agent.harness.install opencode gemini-cli
	@$(BIN)/pytest -m agents --timeout 900

lint: setup-dev  ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

format: setup-dev  ## let ruff arrange the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

fuzz:  ## a million inputs for everything that reads what others wrote
	@scripts/setup --dev
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/pip install -q -e ".[fuzz]"
	@$(BIN)/python tests/fuzz/run.py

bench:  ## figures beside the peers that are installed, in one run
	@scripts/setup --bench
	@$(BIN)/vallum bench

clean:  ## remove what set-up and tests made here
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/vallum/native/vallum-*
