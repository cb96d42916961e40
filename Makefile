# make demo: install and run the whole framework on real data; make test: the test suite; make lint: style and types.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: install proof demo test long faults lint format clean megablocks gpu

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/demo.py

# MegaBlocks' Python sources, which its tests run on the CPU; without them those tests skip.
$(VENV)/megablocks-sources: $(VENV)/.installed
	$(BIN)/python scripts/build_megablocks.py --unpack $@ || echo "without MegaBlocks' sources its CPU test skips"

test: install $(VENV)/megablocks-sources
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 PHI35_MEGABLOCKS_SOURCES="$(abspath $(VENV))/megablocks-sources" \
		$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --durations 15

# The small model learns what it cannot do: SFT, then DPO, with accuracies before and after. Minutes on a CPU.
proof: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/finetune_demo.py

# Tests that take minutes: samples of 131,072 tokens.
long: install
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -s

# The long fault tests: signals and deaths under DeepSpeed's launcher, many kills of ranks that save, a full disk.
faults: install
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/survival -m faults --fault-report benchmarks/results/faults.json

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/moe_layer.py
	$(BIN)/python benchmarks/plan_check.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builds MegaBlocks, stk and grouped-gemm from their published sources; needs nvcc and a CUDA build of torch.
megablocks: install
	$(BIN)/python scripts/build_megablocks.py $(MEGABLOCKS_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
