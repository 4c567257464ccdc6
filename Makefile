# Targets work in any order on a machine with Python 3.11+, git and make: each sets up .venv first, once.
SHELL := /bin/bash
PYTHON ?= python3
READY := .venv/ready
# Stages call `python`, and queued experiments call `dvc`: both must be the environment's.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

REAL := studies/qwen2.5-coder-0.5b-instruct

.PHONY: help setup pull repro verify portability train refresh plan compare picture models test plots perf cuda slow faults soak organisms detection claims full study real label label-check rules lint lock restore

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## create .venv with the pinned dependencies

# A DVC that is killed as it writes dvc.lock or .dvc/tmp/rwlock leaves half of it, and every later command would stop there.
restore: $(READY)
	@python -m stages.restore

pull: restore ## fetch the trained model and the prompts of the committed study, where they are not here already
	@python -m stages.pull

repro: pull ## set up and rebuild every figure of the study (it trains where params.yaml or the code of the training has changed)
	@python -m stages.rebuilt
	dvc repro
	python -m stages.verify committed

verify: $(READY) ## are the figures in metrics/ and plots/ the committed ones, up to rounding?
	python -m stages.verify

portability: restore ## rebuild on a narrower instruction set and compare: metrics/portability.json (five minutes)
	python tests/pipeline/portability.py

train: restore ## train the model anew, and rebuild every figure with it
	rm -rf models/base models/truth models/twin .refusal-store/training
	dvc repro --force --single-item prompts model
	dvc repro
	-python -m stages.verify

refresh: $(READY) ## put the model and the prompts of this dvc.lock into the repository's own remote, and nothing else
	python -m stages.pull refresh
	git add --force --all remote

plan: $(READY) ## what a run will take: forward passes, tokens, judge calls, disk; of a study: make plan STUDY=name
	python -m stages.plan $(STUDY) $(if $(REAL_MODEL),"$(REAL_MODEL)")

test: $(READY) ## set up and run the tests
	python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

compare: restore ## every variant compared on one page: report/variants.html
	set -o pipefail; dvc exp show --json | python -m refusal.report.variants report/variants.html metrics/evaluate.json

picture: $(READY) ## the pictures in the README, docs/*.svg, from committed figures
	python -m refusal.report.picture plots/separation.csv plots/sweep.csv metrics/evaluate.json docs/result.svg
	test ! -d $(REAL)/metrics || python -m refusal.report.picture $(REAL)/plots/separation.csv $(REAL)/plots/sweep.csv $(REAL)/metrics/evaluate.json docs/real.svg
	test ! -f metrics/organisms.json || python -m refusal.report.organisms metrics/organisms.json docs/organisms.svg

models: $(READY) ## every model that was studied beside the write-up's: docs/across-models.md, from committed figures
	python -m stages.models

plots: restore ## every plot as one page, dvc_plots/index.html
	dvc plots show

perf: $(READY) ## measure speed and memory beside common practice (about half an hour on 2 cores)
	python -m perf

cuda: $(READY) ## the tests that need a GPU
	python -m pytest -q -m cuda

slow: $(READY) ## the tests that train organisms on other seeds
	python -m pytest -q -m slow

faults: $(READY) ## put known faults into a copy, one by one: a test must fail at each (ten minutes)
	python -m pytest -q -m faults

soak: $(READY) ## kill a small study at fifty moments and more: metrics/soak.json (a quarter of an hour)
	python tests/pipeline/soak.py

organisms: restore ## train and study every kind of organism on three seeds: metrics/organisms.json (two hours on 1 core)
	dvc repro prompts
	python -m stages.organisms

detection: pull ## edited, fine-tuned and requantized checkpoints of the organism told apart: metrics/detection.json (five minutes)
	python -m stages.detection

claims: restore ## what others say of refusal directions, measured again: docs/claims.md; make claims [CLAIM=pairing] [STUDY=name]
	dvc repro select
	python -m stages.claims $(if $(STUDY),--study $(STUDY)) $(or $(CLAIM),pairing selection harmfulness)
	python -m stages.claims

full: restore ## the science stage on all prompts, beside the study's own: metrics/science_full.json (five minutes)
	dvc repro select
	python -m stages.science full

study: $(READY) ## run studies/<name>.yaml beside the default study: make study STUDY=name; without a name, list all
	python -m stages.studies $(STUDY) $(if $(REAL_MODEL),"$(REAL_MODEL)")

real: $(READY) ## the study of a real Qwen, from the hub or from REAL_MODEL=/path/to/its.gguf
	python -m stages.studies qwen2.5-coder-0.5b-instruct $(if $(REAL_MODEL),"$(REAL_MODEL)")

label: $(READY) ## label a sample of a study's test completions by hand: make label [STUDY=name] [RATER=name] [N=100]
	@python -m stages.label $(STUDY) $(if $(RATER),--rater $(RATER)) $(if $(N),--n $(N))

label-check: $(READY) ## are the labelled completions those of the studies run here, and do the rules agree with the labels?
	python -m stages.label_check

# Labels of a model that came after the rules were frozen are scored alone: SCORED=data/labels/<study>.jsonl.
rules: $(READY) ## select the rules judge anew from labels, those below REFUSAL_REFERENCE among them: metrics/judge_rules.json
	python -m refusal.judges.selection "$$REFUSAL_REFERENCE"/judge/*.csv data/labels/qwen2.5-coder-0.5b-instruct.jsonl \
		$(addprefix --scored ,$(SCORED)) --write --metrics metrics/judge_rules.json

lint: $(READY) ## ruff and mypy
	ruff check .
	mypy refusal stages

# torch comes first and by pip, so that a CPU build is taken where one is offered.
$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet torch==2.13.0
	.venv/bin/python -m pip install --quiet --requirement requirements.lock
	# Offline plots: a page template that holds vega itself.
	.venv/bin/python -m refusal.report.plots_page .venv/plots.html
	.venv/bin/dvc config --local plots.html_template ../.venv/plots.html
	touch $(READY)

lock: $(READY) ## write down the resolved set of versions again
	.venv/bin/python -m pip freeze --exclude-editable --exclude refusal | sed 's/+cpu//' | grep -viE '^(nvidia|triton)' > requirements.lock
