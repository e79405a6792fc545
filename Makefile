# EViT Lab
PYTHON := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup train imagenet test test-all test-slurm check mutants audit benchmark benchmark-gpu dashboard sync report

help:  ## list the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/; s/%/NAME/' | expand -t 16
	@echo 'sweeps:         '$(basename $(notdir $(wildcard sweeps/*.yaml)))

setup: .venv/.ready  ## system libraries and .venv, with pinned versions

.venv/.ready: setup.sh requirements.txt
	@./setup.sh

train: setup  ## train EViT on Fashion-MNIST, in minutes; ARGS="keep_rate=0.5" overrides
	$(PYTHON) src/train.py experiment=fashion_mnist $(ARGS)

# Names of folders are text: neither make nor the shell looks into them.
imagenet: override export ROOT := $(value ROOT)
imagenet: override export TARGET := $(value TARGET)
imagenet: setup  ## ROOT=DIR, ImageNet as downloaded or in class folders -> FFCV files in TARGET (ROOT-ffcv)
	@$(if $(ROOT),,$(error give the folder that holds ImageNet: make imagenet ROOT=DIR))
	$(PYTHON) src/prepare.py "source='$$ROOT'" $(if $(TARGET),"target='$$TARGET'") imagenet=true $(ARGS)

test: setup  ## the tests, in 6 minutes on two cores
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile -m "not slow and not slurm" $(ARGS)

test-all: setup  ## the slow tests too
	$(PYTHON) -m pytest -m "not slurm" $(ARGS)

check: setup  ## linter, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

mutants: setup  ## small faults in src/, one at a time: do tests notice? ARGS="reducers/tome.py" tries one file
	OMP_NUM_THREADS=1 $(PYTHON) tests/mutants.py $(ARGS)

audit: setup  ## known vulnerabilities of the pinned packages, as PyPI itself knows them
	@$(PYTHON) -m pip_audit --strict --no-deps --disable-pip --progress-spinner off \
	  -r requirements.txt || { echo "audit: failed. A package that is not found could not be looked \
	up: that takes PyPI itself, and no mirror of it" >&2; exit 1; }

benchmark: setup  ## images/s, memory and MACs beside the dense model's; ARGS="paper=deit_s" overrides
	$(PYTHON) src/benchmark.py $(ARGS)

benchmark-gpu: setup  ## all GPU measurements, in 8 minutes on one card, into ARGS=DIR (results/speed_gpu)
	$(PYTHON) tests/measure_gpu.py $(ARGS)

dashboard: setup  ## a W&B workspace of your runs
	$(PYTHON) src/dashboard.py $(ARGS)

sync: override export RUNS := $(or $(value RUNS),$(value EVIT_OUTPUT),outputs)
sync: setup  ## upload the W&B runs under outputs/ that were tracked offline, each once
	@find "$$RUNS" -path '*/wandb/offline-run-*/run-*.wandb' -size +7c -print0 | \
	  sort -z | xargs -0r -n1 sh -c '.venv/bin/wandb sync "$$0" || exit 255'

report: setup  ## every finished run beside the paper: report/index.html; ARGS="runs=outputs/NAME" overrides
	$(PYTHON) src/report.py target=report $(ARGS)

sweep-%: sweeps/%.yaml setup  ## run sweeps/NAME.yaml, what is missing; DRY=1 lists runs and GPU hours
	$(PYTHON) src/sweep.py '$*' $(if $(DRY),--dry-run) $(ARGS)

test-slurm: setup  ## sweeps and two processes on a SLURM of this machine's own
	@PYTHON=$(PYTHON) tests/slurm/run.sh $(ARGS)
