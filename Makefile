# Everything a newcomer needs: `make eval` and `make test`. Python 3.10 or newer, nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
SOURCES := vlmfast adapters eval scripts tests

.PHONY: eval compare attention decoding fusion tuning test format check typecheck bench

# The main job: the shipped models under every method and budget, then table, picture and page. Options through ARGS,
# for example `make eval ARGS="--limit 20 --out results/quick"`.
eval: $(VENV)/installed
	$(BIN)/vlmfast eval $(ARGS)

# Every method at the same cost: shares of the unpatched prefill FLOPs, the tower included, that most methods can reach
# (on these small models the tower is a third to two thirds of it).
compare: $(VENV)/installed
	$(BIN)/vlmfast eval --model testbed:llava --method all --flops 0.65,0.5 --out results/equal-flops $(ARGS)
	$(BIN)/vlmfast eval --model testbed:qwen2_5_vl --method all --flops 0.85,0.77 --out results/equal-flops $(ARGS)

# What methods that redistribute attention change: existence by split, captions (CHAIR), reading; paired differences.
# The paper's settings, then a small grid around them.
ATTENTION := zerotuning zerotuning:gamma=0.3 act act:theta=0.03 var pai pai:gamma=1.0 pai:alpha=0.5,gamma=1.0 \
	paint:fallback=received paint:fallback=received,alpha=0.3,gamma=1.0 vhr vhr:layers=1/-3:
attention: $(VENV)/installed
	$(BIN)/vlmfast eval $(ATTENTION:%=--method %) --task existence --task caption --task digits --task word \
		--out results/attention $(ARGS)

# What decoding methods change, against greedy search, beside plain beams of OPERA's width (OPERA without its penalty);
# then OPERA against these.
DECODING := dola deco only vista vcd vcd:branch=fastervlm/keep=0.1/fallback=received m3id agla:matcher=self pai opera \
	opera:alpha=0,threshold=inf
decoding: $(VENV)/installed
	$(BIN)/vlmfast eval $(DECODING:%=--method %) --task existence --task caption --task digits \
		--out results/decoding $(ARGS)
	$(BIN)/vlmfast eval --method opera --beams 5 --task existence --task caption --task digits \
		--out results/decoding-beams $(ARGS)

# Composite attention: which layers bear it, then accuracy against cost from the last layers on.
FUSION := eemllm:layers=4: eemllm:layers=4:,visual_update=none eemllm:layers=2: eemllm:layers=2:,visual_update=none \
	eemllm eemllm:visual_update=none
fusion: $(VENV)/installed
	$(BIN)/vlmfast rank-layers --model testbed:llava --limit 20 --out results/fusion/llava-self.json
	$(BIN)/vlmfast rank-layers --model testbed:qwen2_5_vl --limit 20 --out results/fusion/qwen2_5_vl-self.json
	$(BIN)/vlmfast eval $(FUSION:%=--method %) --out results/fusion $(ARGS)

# What fine-tuning teaches, what is forgotten, and what it costs: every tuner on the testbed's new skill, one table.
# For the other model: make tuning ARGS="--model testbed:qwen2_5_vl".
tuning: $(VENV)/installed
	$(BIN)/python scripts/tuning.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 $(ARGS)

format: $(VENV)/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

check: $(VENV)/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# Type checkers do not see the mapped folders adapters/ and eval/, so what ships is checked.
typecheck: $(VENV)/installed
	rm -rf build
	$(BIN)/pip install -q --no-deps --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p vlmfast

# Speed as ratios measured in one process; see scripts/bench.py --help.
bench: $(VENV)/installed
	$(BIN)/python scripts/bench.py $(ARGS)

# torch first and pinned: see constraints.txt.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[eval,train,demo,dev]'
	touch $@
