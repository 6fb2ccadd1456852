# make demo: train a small classifier and draw what it attends.  make test: everything CI checks of
# the code.  make kernels: compile the GPU kernels, without a GPU.  All make the environment first;
# TORCH= picks another build of PyTorch.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
TRITONS := 3.7 3.8 newest

.PHONY: demo test lint wheel kernels bench tables site

demo: $(VENV)/.demo
	$(PY) examples/digits.py

test: $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadgroup --doctest-modules src/natten tests \
		--cov --cov-report=term --cov-fail-under=90

lint: $(VENV)/.dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

wheel: $(VENV)/.dev
	rm -rf dist
	$(PY) -m build --wheel
	$(PY) -c "import os; w, = os.listdir('dist'); size = os.path.getsize('dist/' + w); \
		print(w, size, 'bytes'); assert w.endswith('-py3-none-any.whl') and size < 1_000_000"

kernels: $(VENV)/.dev $(TRITONS:%=$(VENV)/triton-%/.installed)
	$(PY) benchmarks/kernels.py

bench: $(VENV)/.dev
	$(PY) benchmarks/run.py --device cpu --out .bench.csv

tables: $(VENV)/.dev
	$(PY) benchmarks/report.py

site: $(VENV)/.docs
	$(PY) -m mkdocs build --strict

# PyTorch goes first, so that nothing that depends on it picks another build.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q "$(TORCH)"

$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/bin/python pyproject.toml
	$(PY) -m pip install -q "$(TORCH)" -e ".[$*]"
	touch $@

# Releases of Triton beside the environment's, for benchmarks/kernels.py.
$(VENV)/triton-%/.installed: | $(VENV)/bin/python
	$(PY) -m pip install -q --no-deps --upgrade --target $(@D) \
		"triton$(if $(filter newest,$*),,==$*.*)"
	touch $@
