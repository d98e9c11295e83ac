# make            lists the targets
# make all        everything on the embedded default, from set-up to report
# make train CONFIG=configs/r1-llama-8b.yaml SET="train.sae.l1_coefficient=4"

CONFIG ?= configs/smollm2.yaml
SET ?=
# Options of the command, as ARGS=--force
ARGS ?=
PYTHON ?= python3
# Processes that share the harvest's shards, and that training splits the features over: one a GPU, or PROCS on a CPU.
GPUS ?= 1
PROCS ?= $(GPUS)
# Each loads torch and makes the runs that tests share: 1 GB and 20 s a process.
TEST_PROCESSES ?= 2
# Those of stages and parts whose tests pass on any device, CUDA's backward apart, which the pretended one lacks.
PRETENDED_TESTS = train trainer dataloader evaluate token_injection steering ablation engine explore explorer_writing
RUN = .venv/bin/python -m pipeline

# After Ctrl-C a checkpoint is written; the launcher's own patience is 30 s. It would set OMP_NUM_THREADS to 1 itself,
# with a warning.
LAUNCH = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 $(subst -m pipeline,-m torch.distributed.run --standalone --nproc-per-node $(PROCS) -m pipeline,$(RUN))

.DEFAULT_GOAL := help
.PHONY: help setup all harvest stream train eval explain benchmark explore status verify prune estimate dry-run export test test-browser test-pretended chromium compiler check check-gpu mutants

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16
	@echo 'CONFIG=file chooses the settings, SET="section.key=value ..." changes some of them'
	@echo 'ARGS=--option passes an option of the command on (.venv/bin/python -m pipeline COMMAND --help)'
	@echo 'PROCS=N on a CPU is what GPUS=N is with GPUs'
	@echo 'without a target: .venv/bin/python -m pipeline ingest, steer, generate, compare, diff-stages, push, path (COMMAND --help)'

setup: .venv/.dependencies assets/.complete ## virtual environment, dependencies, embedded model and text

.venv/.dependencies: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.dependencies
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# The kernels' tests run in Triton's interpreter; torch for CUDA brings a triton of its own, torch for CPU none.
	.venv/bin/python -c 'import triton' 2>/dev/null || .venv/bin/python -m pip install --quiet 'triton==3.9.0' || true
	@touch $@

assets/.complete: .venv/.dependencies configs/assets.txt pipeline/assets.py
	.venv/bin/python -m pipeline.assets
	@touch $@

all: setup ## set up, then harvest, train and evaluate; ends with the path of report.html
	@$(RUN) run --config $(CONFIG) $(SET) $(ARGS)

harvest: setup ## sample the text and write the model's activations into a store; GPUS=N takes N GPUs
	@$(RUN) sample --config $(CONFIG) $(SET) $(filter-out --force --yes,$(ARGS))
	@$(if $(filter-out 1,$(PROCS)),$(LAUNCH),$(RUN)) harvest --config $(CONFIG) $(SET) $(ARGS)

stream: setup ## harvest, train on and delete one window after another; GPUS=N takes N GPUs
	@$(RUN) sample --config $(CONFIG) $(SET) $(ARGS)
	@$(if $(filter-out 1,$(PROCS)),$(LAUNCH),$(RUN)) stream --config $(CONFIG) $(SET) $(ARGS)

train: setup ## train an SAE for each hook from the store; GPUS=N splits its features over N GPUs
	@$(if $(filter-out 1,$(PROCS)),$(LAUNCH),$(RUN)) train --config $(CONFIG) $(SET) $(ARGS)

eval: setup ## measure the SAE on held-out text; write the report and the pages of features
	@$(RUN) evaluate --config $(CONFIG) $(SET) $(ARGS)

explain: setup ## let a language model say what features mean, and test it; ARGS="--base-url http://... --model NAME"
	@$(RUN) explain --config $(CONFIG) $(SET) $(ARGS)

benchmark: setup ## let the model answer problems with features operated on and without; PROCS=N shares the problems
	@$(if $(filter-out 1,$(PROCS)),$(LAUNCH),$(RUN)) benchmark --config $(CONFIG) $(SET) $(ARGS)

explore: setup ## type text and see features fire, look at any feature, steer the model; ARGS="--port 8000"
	@$(RUN) explore --config $(CONFIG) $(SET) $(ARGS)

status: setup ## which stage is complete, which would run, and why
	@$(RUN) status --config $(CONFIG) $(SET) $(ARGS)

verify: setup ## read every byte of the stages' results; what is bad is named, and rows are made anew by the next harvest
	@$(RUN) verify --config $(CONFIG) $(SET) $(ARGS)

estimate: setup ## what CONFIG needs: disk, memory, hours, from a short measurement of this machine
	@$(RUN) estimate --config $(CONFIG) $(SET) $(ARGS)

dry-run: setup ## rehearse CONFIG up to the report in a minute or two, on a narrow random model and made-up text
	@$(RUN) dry-run --config $(CONFIG) $(SET) $(ARGS)

prune: setup ## list the runs with size, age and users; delete what CONFIG does not use, after asking
	@$(RUN) prune --config $(CONFIG) $(SET) $(ARGS)

export: setup ## write the trained SAEs as SAELens folders with a model card
	@$(RUN) export --config $(CONFIG) $(SET) $(ARGS)

test: setup .venv/.dev ## the tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-browser: setup .venv/.dev chromium ## report, feature pages and explorer in headless Chromium
	.venv/bin/python -m pytest -m browser tests/browser

test-pretended: setup .venv/.dev compiler ## what CUDA alone runs, on a GPU that is pretended on the CPU: devices, streams, pinned memory
	PRETENDED=everywhere PYTHONPATH=tests OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -p pretended_gpu \
	  -n $(TEST_PROCESSES) --dist worksteal -m 'not browser' tests/pretended $(PRETENDED_TESTS:%=tests/test_%.py)

compiler:
	@command -v g++ >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends g++ >/dev/null; } || { \
	  echo 'test-pretended needs g++; on Debian, as root: apt-get install g++' >&2; exit 1; }

chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; } || { \
	  echo 'test-browser needs chromium and chromedriver; on Debian, as root: apt-get install chromium chromium-driver' >&2; exit 1; }

check: setup .venv/.dev ## style, types, the direction of imports, and the rules of the house
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright
	.venv/bin/lint-imports
	.venv/bin/python -m pytest --noconftest tests/test_house.py

check-gpu: setup .venv/.dev ## what only a GPU shows, in minutes; ARGS="--minutes 4 --only kernels"
	.venv/bin/python -m benchmarks.gpu $(ARGS)

mutants: setup .venv/.dev ## plant small faults in the code, and see which the tests miss; ARGS="--count 20 --files 'train/*.py'"
	.venv/bin/python benchmarks/mutants.py $(ARGS)
