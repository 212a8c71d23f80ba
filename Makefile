# Two commands do everything on a fresh machine, environment included:
#   make demo    convert and verify the small real checkpoint that ships with the project
#   make test    the tests
# PYTHON chooses the interpreter (3.10 or newer), VENV where the environment goes.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: demo test lint docs check clean

demo: $(VENV)/.installed
	$(RUN)/marlin-convert demo --force

test: $(VENV)/.installed
	$(RUN)/python -m pytest

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# The command reference in README.md is what --help prints. `make docs` writes it, `make check` compares.
docs: $(VENV)/.installed
	COLUMNS=100 $(RUN)/cog -r -P README.md

check: lint test
	COLUMNS=100 $(RUN)/cog --check -P README.md

# torch first, and pinned: a bare "torch" takes the newest build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/* kernels/*/*)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build demo-out *.egg-info marlin_convert/_cpu.so marlin_convert/_cuda.so
