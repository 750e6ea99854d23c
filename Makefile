# The front door: `make run`, `make plan`, `make doctor`, `make test`. What they need goes into .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=

SLURM := slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge

# Each is optional: what cannot be built here is left out, and said.
CUDA_PACKAGES := bitsandbytes causal-conv1d mamba-ssm flash-attn

.PHONY: run plan doctor test test-slurm slurm chromium bench install-cuda lint types imports clean

run: $(VENV)/installed
	$(PY) -m llmtrain.run $(ARGS)

plan: $(VENV)/installed
	$(PY) -m llmtrain.plan $(ARGS)

doctor: $(VENV)/installed
	$(PY) -m llmtrain.doctor $(ARGS)

# Two at a time: most tests start processes and wait for them. A file's tests share what is costly.
test: lint types imports
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slurm: slurm $(VENV)/installed-test
	$(PY) -m pytest tests/slurm $(ARGS)

# Speed on this CPU beside other trainers, which get an environment of their own.
bench: $(VENV)/installed-test
	$(PY) -m benchmarks.speed --make-peers .peers $(ARGS)
	$(PY) -m benchmarks.parts --peers .peers/bin/python

# Compiled against the torch that is installed, so without an environment of their own to build in.
install-cuda: $(VENV)/installed
	$(PY) -m pip install -q ninja packaging setuptools wheel
	@for package in $(CUDA_PACKAGES); do \
	    MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
	    $(PY) -m pip install -c constraints.txt --no-build-isolation $$package \
	    || echo "$$package could not be built here, and is left out"; done
	$(PY) -m llmtrain.doctor

slurm:
	@command -v sbatch > /dev/null || apt-get install -y --no-install-recommends $(SLURM) \
	    || (apt-get update && apt-get install -y --no-install-recommends $(SLURM))

chromium:
	@command -v chromium > /dev/null || apt-get install -y --no-install-recommends chromium \
	    || (apt-get update && apt-get install -y --no-install-recommends chromium)

lint: $(VENV)/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/installed-test
	$(PY) -m mypy

imports: $(VENV)/installed-test
	$(VENV)/bin/lint-imports

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "PYTHON=$(PYTHON) is older than 3.10; run: make $(MAKECMDGOALS) PYTHON=<a newer one>"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PY) -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PY) -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache llmtrain.egg-info
