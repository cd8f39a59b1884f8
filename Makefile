# The commands that one types. PYTHON is that of the environment: `make setup` makes it, or say make test PYTHON=python.
PYTHON ?= .venv/bin/python

.PHONY: setup test quick lint types docs help faults bench overheads

setup:  ## the environment, with everything that the tests and the checks need
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -e '.[test,dev]'

test:  ## everything, in parallel where it may be: half an hour on two cores
	PYTHON=$(PYTHON) sh tests/run

quick:  ## the mathematics alone: under a minute
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q $(QUICK)

lint:  ## ruff's rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## mypy on the rooms that are typed in full
	$(PYTHON) -m mypy

docs:  ## the site of docs/, with the reference of the public names, in site/
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

help:  ## after a change of settings: what --help prints, the page of the scalars, the tables of the algorithms' pages
	$(PYTHON) -m rlfusion.cli.help_writer
	$(PYTHON) -m rlfusion.training.scalars > docs/metrics.md
	$(PYTHON) docs/site/algorithms.py

faults:  ## what goes wrong on a cluster, for real, and the table of it
	$(PYTHON) -m pytest -q -s $(FAULTS)

bench:  ## what rollout and update cost beyond the network's own passes: some minutes
	$(PYTHON) benchmarks/overhead.py --quick --cpu-time --threads 1
	$(PYTHON) benchmarks/learner_overhead.py --rounds 5

overheads:  ## the same of every agent on a tiny pipeline, held against what is recorded; fails where one is worse by more than .15
	$(PYTHON) benchmarks/learner_overhead.py --check

FAULTS = tests/faults/test_checkpoint_kills.py tests/faults/test_fault_runs.py tests/faults/test_fault_table.py \
	tests/faults/test_lost_ranks.py tests/faults/test_lost_trainings.py

QUICK = tests/common tests/objectives tests/test_layers.py tests/test_house.py \
	tests/diffusion/test_gaussian.py tests/diffusion/test_kinds.py tests/diffusion/test_kernel.py \
	tests/diffusion/test_parameterization.py tests/diffusion/test_schedule.py
