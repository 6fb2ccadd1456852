# make demo: train a small classifier and draw what it attends.  make weather: train a forecast of an
# ocean and draw it.  make test: everything CI checks of the code.  make programs: whole programs that
# use it.  make kernels: compile the GPU kernels, without a GPU.  These make the environment first;
# TORCH= picks another build of PyTorch.  make hub: a folder for Hugging Face's kernels, HUB=.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
TRITONS := 3.7 3.8 newest
HUB ?= hub
# What goes with this PyTorch and no other.
PINNED := $(if $(filter torch==2.13.0%,$(TORCH)),-r tests/pinned.txt)

.PHONY: demo weather test programs lint wheel release-check kernels bench tables site hub

demo: $(VENV)/.demo
	$(PY) examples/digits.py

weather: $(VENV)/.demo
	$(PY) examples/weather.py

test: $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadgroup --doctest-modules src/natten tests \
		--ignore tests/programs --cov --cov-report=term --cov-fail-under=90

programs: $(VENV)/.dev $(VENV)/hub/.installed $(VENV)/transformers-4.53.3/.installed
	$(PY) -m pytest tests/programs
	PYTHONPATH=$(abspath $(VENV)/transformers-4.53.3) $(PY) -m pytest \
		tests/programs/test_transformers.py
	PYTHONPATH=$(abspath $(VENV)/hub) $(PY) -m pytest \
		tests/programs/test_transformers.py tests/programs/test_hub.py tests/programs/test_diffusers.py

lint: $(VENV)/.dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# The wheel is built from the sdist, whose tests find all that they need: some of them run.
wheel: $(VENV)/.dev
	rm -rf dist build
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) -m pip check
	$(PY) -c "import glob, os; w, = glob.glob('dist/*.whl'); size = os.path.getsize(w); \
		print(w, size, 'bytes'); assert w.endswith('-py3-none-any.whl') and size < 1_000_000"
	mkdir build && tar -xzf dist/*.tar.gz -C build --strip-components=1
	if git rev-parse -q --verify HEAD >/dev/null 2>&1; then \
		git ls-files | while read -r file; do test -e "build/$$file" || echo "$$file"; done \
		| (! grep .); fi
	cd build && PYTHONPATH=src $(abspath $(PY)) -m pytest -q -p no:cacheprovider \
		tests/test_signatures.py tests/test_benchmarks.py tests/test_imports.py
	rm -rf build

# What is released, installed and tried as a user has it.
release-check: wheel
	$(PY) .ci/release_check.py

kernels: $(VENV)/.dev $(TRITONS:%=$(VENV)/triton-%/.installed)
	$(PY) benchmarks/kernels.py
	for triton in $(TRITONS); do \
		PYTHONPATH=$(VENV)/triton-$$triton $(PY) -m pytest -q tests/test_launching.py || exit; done

bench: $(VENV)/.dev
	$(PY) benchmarks/run.py --device cpu --out .bench.csv

tables: $(VENV)/.dev
	$(PY) benchmarks/report.py

site: $(VENV)/.docs
	$(PY) -m mkdocs build --strict

hub:
	$(PYTHON) .ci/hub.py $(HUB)

# PyTorch goes first, so that nothing that depends on it picks another build.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q "$(TORCH)"

$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/bin/python pyproject.toml tests/pinned.txt
	$(PY) -m pip install -q "$(TORCH)" -e ".[$*]" $(if $(filter dev,$*),$(PINNED))
	touch $@

# Releases of Triton beside the environment's, for benchmarks/kernels.py.
$(VENV)/triton-%/.installed: | $(VENV)/bin/python
	$(PY) -m pip install -q --no-deps --upgrade --target $(@D) \
		"triton$(if $(filter newest,$*),,==$*.*)"
	touch $@

# Packages for tests/programs beside the environment's.
$(VENV)/hub/.installed: tests/hub.txt | $(VENV)/bin/python
	$(PY) -m pip install -q --no-warn-conflicts --no-compile --upgrade --target $(@D) -r $<
	touch $@

$(VENV)/transformers-%/.installed: | $(VENV)/bin/python
	$(PY) -m pip install -q --no-deps --no-compile --upgrade --target $(@D) transformers==$*
	touch $@
