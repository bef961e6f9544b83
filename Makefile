# make bench: the zoo compared, on this machine.   make test, make test-all, make check: what a change must pass (.ci/run).
PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help venv bench test test-all check format dev docs constraints clean

help:
	@echo "make bench [ARGS=...]  prefzoo bench quick: all algorithms on the same data, a leaderboard"
	@echo "make test              the tests"
	@echo "make test-all          the longer proofs only"
	@echo "make check             style, wheel in a clean venv, types, import arrows, documentation"
	@echo "make format            apply the style"
	@echo "make dev               .dev/prefzoo: a tree of links, for editors and for machines without an install"
	@echo "make docs              the documentation at http://127.0.0.1:8000"
	@echo "make constraints       write constraints.txt from what $(VENV) holds"
	@echo "make clean             remove what the targets left behind, $(VENV) excepted"
	@echo "PYTHON=python3.12 chooses the interpreter of a new $(VENV), JOBS=8 the test processes."

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,dev]"
	@touch $@

bench: $(STAMP)
	$(BIN)/prefzoo bench quick $(ARGS)

test: $(STAMP)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -q -m "not long and not gpu and not peer" $(ARGS)

test-all: $(STAMP)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -q -m "long and not gpu and not peer" $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/layout.py arrows
	$(BIN)/python .ci/installed.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dev:
	$(PYTHON) .ci/layout.py links

docs: $(STAMP)
	$(BIN)/python .ci/layout.py links
	PYTHONPATH=.dev $(BIN)/mkdocs serve

constraints: $(STAMP)
	$(BIN)/python .ci/constraints.py > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf build dist site .check .dev .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
