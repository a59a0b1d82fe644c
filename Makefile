# Every target sets up .venv first; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
# What `make index` compares with; a release that package indexes may hold as a build for CPUs, of 0.2 GB instead of 3.
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo quick test soak index check clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python scripts/train.py tiny

quick: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m 'quick and not index and not soak'

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

soak: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m soak

index: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -e ".[dev,hf-test]"
	$(BIN)/python -m pytest -m index

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs
