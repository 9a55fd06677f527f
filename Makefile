PYTHON ?= python3
BIN := .venv/bin
# On Linux a plain torch brings gigabytes of CUDA. For the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test docs docs-serve package clean

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

# Without it mkdocs-material prints an advertisement of its successor.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: .venv/docs
	$(BIN)/mkdocs build --quiet --strict

docs-serve: .venv/docs
	$(BIN)/mkdocs serve

.venv/docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[docs]'
	@touch $@

# The wheel runs in an environment of its own, which borrows nothing but the packages that it depends on.
package: .venv/dev .venv/package
	rm -rf dist .venv/wheel
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv/wheel
	.venv/wheel/bin/python -m pip install --disable-pip-version-check --quiet --no-deps dist/*.whl
	cd .venv/wheel && PYTHONPATH="$$(../bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		bin/python ../../tests/wheel.py

.venv/package: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[package]'
	@touch $@

clean:
	rm -rf .venv dist site report samples samples-ray samples-torchrun samples-jax samples.png plan.json plan.png evaluation.json digit.png eights.png mask.png painted.png linear-demo.png
