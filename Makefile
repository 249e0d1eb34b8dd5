# make smoke: install, train 50 steps, print a sample. make test: the fast suite. CONTRIBUTING.md tells the rest.
VENV ?= .venv
PY = $(VENV)/bin/python
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -rs

.PHONY: setup smoke test test-slow test-all torture test-oldest test-torch lint format docs

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt
	test -x $(PY) || python3 -m venv $(VENV)
	if command -v uv >/dev/null; then uv pip install -q --python $(PY) -r requirements.txt -r requirements-dev.txt; \
	else $(PY) -m pip install -q -r requirements.txt -r requirements-dev.txt; fi
	touch $@

smoke: setup
	$(PY) train.py --config config_smoke.yaml
	$(PY) infer.py --ckpt checkpoints/final.ckpt --prompt "Attention is"

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

test-all: test test-slow

# Kill and resume at random moments, for about ten minutes. docs/RELIABILITY.md tells what came of it.
torture: setup
	$(PY) tests/torture.py --kills 160

# The oldest versions that requirements.txt allows, in an environment of their own.
test-oldest:
	test -x .venv-oldest/bin/python || uv venv --python 3.11 .venv-oldest
	uv pip install -q --python .venv-oldest/bin/python --resolution lowest-direct -r requirements.txt -r requirements-dev.txt
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 -rs -m "not slow or compiler"

# Compiled against eager training with another PyTorch, in an environment of its own: make test-torch TORCH=2.11.0
test-torch:
	test -x .venv-torch-$(TORCH)/bin/python || uv venv --python 3.11 .venv-torch-$(TORCH)
	uv pip install -q --python .venv-torch-$(TORCH)/bin/python torch==$(TORCH) setuptools -r requirements.txt
	OMP_NUM_THREADS=1 .venv-torch-$(TORCH)/bin/python -m pytest -rs -m compiler tests/core

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What is made from the code: the page of all config keys, and the drawing of the rooms.
docs: setup
	$(PY) -m support.config.reference > docs/CONFIG_REFERENCE.md
	$(PY) tests/arrows.py
