# make demo    the whole method on the pocket model; ARGS go to `python -m safedig_core demo`
# make test    ruff, pyright and pytest; ARGS go to pytest
# make clean   removes .venv and caches
#
# demo and test set up .venv by themselves: Python 3.10 or later and a package index are all they need.
#   make demo ARGS="--json out.json"
#   make test ARGS="-k sae" PYTHON=python3.12
# A torch that is already in .venv is kept. On Linux the plain torch brings several GB for NVIDIA GPUs;
# to do without on the first run:
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

# Idle OpenMP threads spin for some microseconds, then sleep: fast on a quiet machine and on a busy one.
export GOMP_SPINCOUNT = 20000

.PHONY: help demo test clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.demo
	$(RUN) -m safedig_core demo $(ARGS)

test: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	$(RUN) -m pytest $(ARGS)

clean:
	rm -rf $(VENV) .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per requirements file: newer than all that it was installed from.
$(VENV)/.demo: requirements-demo.txt requirements.txt
$(VENV)/.dev: requirements-dev.txt requirements-demo.txt requirements.txt
$(VENV)/.%: requirements-%.txt | $(RUN)
	$(RUN) -c "import torch" 2>/dev/null || $(PIP) install $(TORCH)
	$(PIP) install -q -r $<
	touch $@

$(RUN):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	  echo "SafeDIG needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
