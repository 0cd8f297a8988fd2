# `make demo` and `make test` set up what they need on a fresh machine: Python >= 3.10.
PYTHON ?= python3
BIN := .venv/bin
# processes that tests are shared out over, each with one thread
WORKERS ?= 2

.PHONY: setup demo test check docs fmt test-gpu bench fuzz oracle peers bench-gpu

setup: .venv/.ready

.venv/.ready: pyproject.toml setup.py constraints.txt $(wildcard runtime/csrc/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qexport needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site of docs/, in site/; every table and picture is made anew first.
docs: setup
	$(BIN)/python -m docs.made
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html; search wants a server: python3 -m http.server -d site"

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# The real engines that the oracle tests ask; without it `make test` skips them and says so.
oracle: .venv-oracle/.ready

.venv-oracle/.ready: tests/oracle/install.py constraints.txt
	$(PYTHON) tests/oracle/install.py

# 200,000 mutated checkpoints against every reader; twenty minutes on one core.
fuzz: setup
	$(BIN)/python -m tests.fuzz --count 200000

# onnxruntime and llama.cpp, beside which the benchmarks run.
peers: .venv-bench/.ready

.venv-bench/.ready: benchmarks/peers.py
	$(PYTHON) benchmarks/peers.py

bench: setup peers
	$(BIN)/python -m benchmarks.fake_quant
	$(BIN)/python -m benchmarks.bits
	$(BIN)/python benchmarks/pack.py
	$(BIN)/python -m benchmarks.cpu_kernels
	$(BIN)/python -m benchmarks.cpu_kernels --hot
	$(BIN)/python -m benchmarks.threads
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.decode --shape 1b

# On a machine with an NVIDIA GPU: tiles first, then every kernel that is installed, then decoding.
bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu --tune
	$(BIN)/python -m benchmarks.gpu_decode
