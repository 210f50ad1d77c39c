# `make run` distils the digits teacher; `make test` runs all tests. Both set everything up by themselves.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install install-cluster run test test-all test-faults test-cluster bench lint format clean

help:
	@echo "make run    set up and distil the built-in digits teacher (about 4 minutes on two cores)"
	@echo "make test   set up and run the tests"
	@echo "make test-all  the tests and the slow ones: every stage, precision and world size"
	@echo "make test-faults  every fault at every ZeRO stage: lost workers, nodes, drivers, storage"
	@echo "make test-cluster  a Ray cluster over SSH, in namespaces of this machine (root; openssh-server, rsync)"
	@echo "make install-cluster  what ray up and ray job submit need, too"
	@echo "make bench  every measurement of docs/results/performance.md into ./bench (hours on two quiet cores)"
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

# Two processes, whatever the number of cores: much of the time is waiting for Ray to start, and more clusters at once
# only get into each other's way.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: install
	$(BIN)/python -m pytest $(TWO)

test-all: install
	$(BIN)/python -m pytest $(TWO) -m "(slow or not slow) and not faults"

test-faults: install
	$(BIN)/python -m pytest tests/faults -m "faults or not faults"

test-cluster: install-cluster
	$(BIN)/python -m pytest tests/cluster -m cluster -s

# One folder of JSON; the tables come out on the terminal.
bench: install
	mkdir -p bench
	$(BIN)/python -m benchmarks.compare --json bench/compare.json
	$(BIN)/python -m benchmarks.modes --json bench/modes.json
	$(BIN)/python -m benchmarks.sharding --json bench/sharding.json
	$(BIN)/python -m benchmarks.scaling --json bench/scaling.json
	$(BIN)/python -m benchmarks.checkpoints --json bench/checkpoints.json
	$(BIN)/python -m benchmarks.overheads loop --json bench/loop-digits.json
	$(BIN)/python -m benchmarks.overheads loop --preset cifar10-uncond --batch 4 --rounds 5 --threads 2 \
		--json bench/loop-cifar10.json
	$(BIN)/python -m benchmarks.overheads job --json bench/job.json
	$(BIN)/python -m benchmarks.overheads start --json bench/start.json
	$(BIN)/python -m benchmarks.fid --json bench/fid.json

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
