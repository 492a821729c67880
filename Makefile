# make demo      train in FP32, FP16 and BF16, with torch's AMP and with fusedamp; table and plot in demo-out/
# make check     seconds: format, lint, types, without compiling
# make quick     minutes: the tests that are not slow
# make test      all tests
# make bench     time against torch
# make mutants   broken variants that the tests must detect
# make docs      the pages, in build/docs/
# make evidence  on a machine with a GPU: builds for it, tests, measures, and writes benchmarks/results/
# make release   files for users in dist/, checked; uploads nothing
# make matrix    try the files in dist/ under other Pythons and torches
# make dev       all tools, and git hooks
#
# They use the active virtual environment and its torch; without one, they create .venv and install torch there.
# TORCH="torch==2.13.0" selects the torch for a new environment; INSTALL=some.whl tests a built wheel.

TORCH   ?= torch>=2.11
INSTALL ?= -e .
VENV    := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PY      := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

demo: $(VENV)/.fusedamp-demo
	$(PY) -m fusedamp demo --out demo-out $(ARGS)

test: $(VENV)/.fusedamp-test
	$(PY) -m pytest -n auto $(ARGS)

quick: $(VENV)/.fusedamp-test
	$(PY) -m pytest -n auto -m "not slow and not integration" $(ARGS)

bench: $(VENV)/.fusedamp-bench
	$(PY) benchmarks/run.py $(ARGS)

docs: $(VENV)/.fusedamp-docs
	$(PY) -m sphinx -q -W --keep-going -c docs . build/docs $(ARGS)
	@echo "build/docs/index.html"

# Installs nothing, for machines without network access. PYTHON=... selects the interpreter; it must have torch.
evidence:
	$(or $(PYTHON),$(VIRTUAL_ENV:%=%/bin/python),python3) benchmarks/evidence/run.py $(ARGS)

mutants: $(VENV)/.fusedamp-test
	$(PY) tests/mutants.py $(ARGS)
	$(PY) tests/emulation/mutants.py $(ARGS)

check: $(VENV)/.fusedamp-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) tests/anchors.py
	find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror

release: $(VENV)/.fusedamp-release
	$(PY) .ci/release.py $(ARGS)

# All that are known, or PYTHON="3.11 3.13" TORCH="2.11.0 2.15.0".
matrix:
	python3 .ci/matrix.py $(if $(PYTHON),--python $(PYTHON)) $(if $(findstring line,$(origin TORCH)),--torch $(TORCH)) $(ARGS)

dev: $(VENV)/.fusedamp-dev $(VENV)/.fusedamp-test $(VENV)/.fusedamp-demo
	@if [ -d .git ]; then $(PY) -m pre_commit install; fi

$(PY):
	python3 -m venv $(VENV)

# Installs fusedamp with the named extra, and again when compiled sources changed. With nvcc, it builds code for two
# architectures and PTX, which run on every GPU from 8.0; code for all architectures takes minutes.
ARCHS = TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0;9.0+PTX}"
PIP = $(PY) .progress.py
HAS_TORCH = $(PY) -c 'import torch' 2>/dev/null || \
	$(PIP) "Installing torch into $(VENV), once. A download of it takes minutes" -m pip install '$(TORCH)'
$(VENV)/.fusedamp-%: $(SOURCES) | $(PY)
	@$(HAS_TORCH)
	@$(ARCHS) $(PIP) "Installing fusedamp with its $* tools. A first build takes minutes" -m pip install $(if $(filter %.whl,$(INSTALL)),'$(INSTALL)[$*]',-e '.[$*]')
	@touch $@

# The tools alone: nothing is compiled.
EXTRA = import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
$(VENV)/.fusedamp-dev $(VENV)/.fusedamp-release: pyproject.toml | $(PY)
	@$(HAS_TORCH)
	$(PY) -c '$(EXTRA)' $(@:$(VENV)/.fusedamp-%=%) | $(PIP) "Installing tools" -m pip install -r /dev/stdin
	@touch $@

.PHONY: demo test quick bench docs evidence mutants check release matrix dev
