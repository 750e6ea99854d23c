# The front door: `make run`, `make plan`, `make doctor`, `make test`. What they need goes into .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=

SLURM := slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge

.PHONY: run plan doctor test test-slurm slurm lint types imports clean

run: $(VENV)/installed
	$(PY) -m llmtrain.run $(ARGS)

plan: $(VENV)/installed
	$(PY) -m llmtrain.plan $(ARGS)

doctor: $(VENV)/installed
	$(PY) -m llmtrain.doctor $(ARGS)

# Two at a time: most tests start processes and wait for them. A file's tests share what is costly.
test: lint types imports
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-slurm: slurm $(VENV)/installed-test
	$(PY) -m pytest tests/slurm $(ARGS)

slurm:
	@command -v sbatch > /dev/null || apt-get install -y --no-install-recommends $(SLURM) \
	    || (apt-get update && apt-get install -y --no-install-recommends $(SLURM))

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
