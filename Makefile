# Two commands do everything on a machine with Python 3.10 or newer, a C++17 compiler and make.

PYTHON ?= python3
BIN := .venv/bin
RUN ?=

.PHONY: demo test install clean

demo: install  ## Deliberate Practice against static data on the embedded generator, about six minutes on two cores
	$(BIN)/dpfast run fashion --overwrite $(RUN)

test: install  ## lint, types and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

install: .venv/installed

# The constraints pin a torch that has a CPU build; without them pip may take a CUDA build of several gigabytes.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info dpfast/*.so runs
