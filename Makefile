# Every target sets up VENV first: of the interpreter PYTHON (3.11 or newer), with the package's EXTRAS.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
# What `make index` compares with; a release that package indexes may hold as a build for CPUs, of 0.2 GB instead of 3.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo quick test newest soak index docs figures check clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python scripts/train.py tiny

quick: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m 'quick and not index and not soak'

# Files stay together on a worker (loadfile): what a file compiles once, no other worker compiles again.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(SELECT)

# Tests that depend on the version of JAX, and the quick ones, on the newest Python, with the newest JAX and its compilers
# for ROCm and TPU.
newest:
	python=$$(.ci/python newest) && $(MAKE) test PYTHON="$$python" VENV=.venv-newest EXTRAS=dev,aot-rocm,aot-tpu \
	    SELECT="-m 'newest and not index and not soak'"

soak: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m soak --timeout 0

index: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[dev,hf-test,browser-test]"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m index

# Compiles for MI300X, H100 and TPU, for hours if no cell of the planner's table is kept; writes tables of README, docs/
# and benchmarks/.
figures: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[aot-rocm,aot-cuda,aot-tpu,viz]"
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/figures.py

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv .venv-newest runs site
