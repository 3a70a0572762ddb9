# `make demo` and `make test` do all the set-up on a fresh machine: they build .venv when it is
# missing or older than setup.py and the constraints.
PYTHON ?= python3
VENV := .venv
VIDEOS ?=
OUT ?= out/demo
PYVER := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(wildcard constraints/$(PYVER).txt)
STAMP := $(VENV)/installed-$(PYVER)
PARITY := $(VENV)/installed-parity-$(PYVER)
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal

# XLA's CPU buffers come and go every step; on Linux huge pages make them nearly twice as fast, and
# one arena keeps them from one step to the next.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592:glibc.malloc.arena_max=1

.PHONY: demo test test-all lint clean venv

venv: $(STAMP)

$(STAMP): setup.py $(CONSTRAINTS)
	@test -n "$(CONSTRAINTS)" || { echo "No constraints/$(PYVER).txt: walt_jax is tested on Python 3.11 and 3.12. Choose one with PYTHON=python3.11."; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	touch $@

# Torch, whose numbers ours are tested against. On Linux its wheel brings 4 GB of CUDA along; pip
# takes one without if PIP_EXTRA_INDEX_URL is https://download.pytorch.org/whl/cpu.
$(PARITY): $(STAMP)
	$(INSTALL) '.[dev,parity,eval,data,text,colabs]'
	touch $@

demo: $(STAMP)
	$(RUN) -m walt_jax.demo --out $(OUT) $(if $(VIDEOS),--videos '$(VIDEOS)')

test: $(STAMP)
	$(PYTEST) -m 'not slow'

test-all: $(PARITY)
	$(PYTEST)

lint: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache
