# make demo   install and train GEM on the rotated digits      make lint    formatting, style and types
# make test   install and run the tests                        make bench   install and run the benchmarks
# make soak   hours of hard inputs: SEED, PROBLEMS, FUZZ_SECONDS and STEPS on the command line change what is run
PYTHON ?= python3
# The torch that gem_fast is developed with; any torch >= 2.10 runs it.
TORCH ?= torch==2.13.0
# How much `make soak` does.
SEED ?= 0
PROBLEMS ?= 1000000
STEPS ?= 100000
FUZZ_SECONDS ?= 600

VENV := .venv
BIN := $(VENV)/bin
# What a compiled build depends on; Python files are used in place.
BUILD := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/* tests/native/*)

.PHONY: demo test lint bench soak clean

demo: $(VENV)/demo.installed
	$(BIN)/python -m gem_fast run --stream rotations --learner gem --out out/rotations

test: $(VENV)/test.installed
	$(BIN)/python -m pytest

lint: $(VENV)/test.installed $(VENV)/lint.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

bench: $(VENV)/bench.installed
	cd bench && ../$(BIN)/python -m pytest --benchmark-json=results/cpu.json
	cd bench && ../$(BIN)/python bench_growth.py

soak: $(VENV)/soak.installed
	cd tests && OPENBLAS_NUM_THREADS=1 ../$(BIN)/python -m soak.solver --seed $(SEED) --problems $(PROBLEMS)
	cd tests && ../$(BIN)/python -m soak.leak --steps $(STEPS)
	cd tests && ../$(BIN)/python -m soak.large
	cd tests && SANITIZER_ROUNDS=1000 ../$(BIN)/python -m pytest test_sanitizers.py
	cd tests && for target in operators idx; do \
	    ../$(BIN)/python -m fuzz.run $$target -seed=$$(($(SEED) + 1)) -max_total_time=$(FUZZ_SECONDS) || exit 1; done

clean:
	rm -rf $(VENV) build out *.egg-info gem_fast/*.so

$(VENV)/%.installed: $(BUILD) | $(BIN)/pip
	$(BIN)/pip install --quiet '$(TORCH)' -e '.[$*]'
	touch $@

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gem_fast needs Python 3.10 or newer, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "making a virtual environment failed: install the venv module (on Debian or Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
