# make demo    the demonstration, on a machine with Python 3 and a compiler
# make test    the test suite           make test ARGS="-k stiefel -x"
# make lint    ruff: rules and format
# make clean   what builds and tools left behind; distclean takes the environment too
#
# The first call sets up $(VENV) (a minute or two); later calls start at once, until one of the files that the set-up
# depends on changes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# Two stamps in one environment: the demo doesn't wait for the development tools, and after a test it needs no set-up.
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
SETUP := .ci/setup_venv.sh
INPUTS := pyproject.toml setup.py constraints.txt $(SETUP) $(wildcard csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint clean distclean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(READY)
	$(VENV)/bin/baft demo $(ARGS)

test: $(READY_DEV)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(READY_DEV)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

$(READY): $(INPUTS)
	@PYTHON="$(PYTHON)" $(SETUP) "$(VENV)"
	@touch $@

$(READY_DEV): $(INPUTS)
	@PYTHON="$(PYTHON)" $(SETUP) "$(VENV)" dev
	@touch $(READY) $@

clean:
	rm -rf build dist baft_kernels/_cpu.* baft_kernels/_cuda.* *.egg-info python/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find baft_kernels python bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf "$(VENV)"
