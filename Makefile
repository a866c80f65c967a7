# Commands for people and CI. Everything runs in .venv, which is made on first use and renewed when its inputs change.
PYTHON ?= python3
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)
VENV := .venv
STAMP := $(VENV)/.installed
# One process per core with one thread each: the tests' tensors are too small to be worth a second thread. A file stays
# on one worker, because its tests share what they trained; files begin in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: venv demo demo-llm test test-faults unit lint types docs bench-gpu
.DEFAULT_GOAL := venv

venv: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mlx]' \
		|| echo "MLX has no wheel for this machine (it needs glibc 2.35 or Apple silicon): its tests are skipped"
	touch $@

demo: $(STAMP)
	DS_ACCELERATOR=cpu $(VENV)/bin/rwkvinside demo $(ARGS)

# A published model, from the hub or TEACHER=DIR, on DATA=FILE or on what it writes itself. ARGS takes the command's, such as ARGS='stages.distill.tokens=100k'.
demo-llm: $(STAMP)
	DS_ACCELERATOR=cpu $(VENV)/bin/rwkvinside demo --teacher $(or $(TEACHER),SmolLM2-135M) $(DATA:%=--data %) $(ARGS)

# Everything. ARGS takes pytest's, such as ARGS='-m "not distributed"' or ARGS=tests/data.
test: $(STAMP)
	$(PYTEST) $(ARGS)

# What to run after every change: about a minute.
unit: $(STAMP)
	$(PYTEST) -m unit $(ARGS)

# All that is damaged, killed or mistyped on purpose, with a table by kind; under a quarter of an hour on two cores.
# SEED=7 chooses other faults, FAULTS=small those of `make test`. Their folder is named so that its table is printed.
test-faults: export SEED ?= 0
test-faults: export FAULTS ?= full
test-faults: $(STAMP)
	$(PYTEST) -m faults tests/faults $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

# The pages of docs/ and of the public API, into site/; without network, a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# All that is measured on a GPU, within 520 seconds; ends in build/gpu/. PYTHON needs torch, triton, transformers,
# pydantic and omegaconf. ARGS takes the command's, such as ARGS='--dry' or ARGS='--stages facts,kernels'.
bench-gpu:
	$(PYTHON) -m rwkvinside.bench.gpu_session --out build/gpu $(ARGS)
