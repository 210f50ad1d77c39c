# `make run` distils the digits teacher; `make test` runs all tests. Both set everything up by themselves.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install install-cluster run test test-all test-faults test-cluster lint format clean

help:
	@echo "make run    set up and distil the built-in digits teacher (about 4 minutes on two cores)"
	@echo "make test   set up and run the tests"
	@echo "make test-all  the tests and the slow ones: every stage, precision and world size"
	@echo "make test-faults  every fault at every ZeRO stage: lost workers, nodes, drivers, storage"
	@echo "make test-cluster  a Ray cluster over SSH, in namespaces of this machine (root; openssh-server, rsync)"
	@echo "make install-cluster  what ray up and ray job submit need, too"
	@echo "make lint   ruff, types, import layers"
	@echo "make format rewrite the code in the project's style"

# torch first and pinned: any other order lets a dependency choose another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[digits,dev]'
	touch $@

$(VENV)/.installed-cluster: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[cluster]'
	touch $@

install: $(VENV)/.installed

install-cluster: $(VENV)/.installed-cluster

run: install
	$(BIN)/sid-ray distill digits

test: install
	$(BIN)/python -m pytest

test-all: install
	$(BIN)/python -m pytest -m "(slow or not slow) and not faults"

test-faults: install
	$(BIN)/python -m pytest tests/faults -m "faults or not faults"

test-cluster: install-cluster
	$(BIN)/python -m pytest tests/cluster -m cluster -s

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV)
