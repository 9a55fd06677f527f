PYTHON ?= python3
BIN := .venv/bin
# On Linux a plain torch brings gigabytes of CUDA. For the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test clean

demo: .venv/demo
	$(BIN)/deis sample --out samples.png
	@echo "Look at the picture: samples.png"

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cli]'
	@touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/demo

clean:
	rm -rf .venv samples.png plan.json plan.png evaluation.json digit.png eights.png mask.png painted.png
