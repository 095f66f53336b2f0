# make demo   install and train GEM on the rotated digits      make lint    formatting, style and types
# make test   install and run the tests                        make bench   install and run the benchmarks
# make integrations   run the tests of gem_fast.integrations with the frameworks and another torch, but the same build
# make paper  install and make the paper's tables and figure, and one of descriptors, in bench/results/paper: hours, resumable
# make soak   hours of hard inputs: SEED, PROBLEMS, FUZZ_SECONDS and STEPS on the command line change what is run
# make gpu-check   on a machine with a GPU: build, test and time there in under eight minutes, into OUT
PYTHON ?= python3
# The torch that gem_fast is developed with; any torch >= 2.10 runs it.
TORCH ?= torch==2.13.0
# Where `make gpu-check` writes; its Python must have torch and what bench/gpu/check names. DRY=1 needs no GPU.
OUT ?= out/gpu
DRY ?=

# How much `make soak` does.
SEED ?= 0
PROBLEMS ?= 1000000
STEPS ?= 100000
FUZZ_SECONDS ?= 600

# What `make paper` is run with: SEEDS=0 is a fifth of the work; CIFAR=cifar-100-binary.tar.gz names an archive or folder,
# otherwise CIFAR-100 is taken from torchvision's folder.
SEEDS ?= 0 1 2 3 4
CIFAR ?=

# What `make bench` measures on a CPU beside the benchmarks that pytest runs.
BENCH_SCRIPTS := bench_growth bench_memory bench_pareto bench_shortcuts bench_transformers resnet_profile step_profile

# Where `make bench` measures: cpu or cuda.
DEVICE ?= cpu

VENV := .venv
BIN := $(VENV)/bin
INTEGRATIONS := .venv-integrations
CSRC := $(wildcard csrc/*/*.* csrc/*/*/*.*)
# What a build depends on.
BUILD := setup.py pyproject.toml $(CSRC)
CXX_FILES := $(CSRC) $(wildcard tests/csrc/simt/* tests/csrc/native/*)

.PHONY: demo test integrations lint bench gpu-check paper soak clean

demo: $(VENV)/installed
	$(BIN)/python -m gem_fast run --stream rotations --learner gem --out out/rotations

test: $(VENV)/installed $(VENV)/test.tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

integrations: $(INTEGRATIONS)/installed
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations tests/csrc/test_operators.py

lint: $(VENV)/installed $(VENV)/test.tools $(VENV)/lint.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

bench: $(VENV)/installed $(VENV)/bench.tools
	cd bench && DEVICE=$(DEVICE) ../$(BIN)/python -m pytest --benchmark-json=results/$(DEVICE).json
	cd bench && for script in $(if $(filter cpu,$(DEVICE)),$(BENCH_SCRIPTS)); do ../$(BIN)/python $$script.py || exit 1; done
	$(BIN)/python bench/tables.py bench/results/$(DEVICE).json

gpu-check:
	$(PYTHON) bench/gpu/check $(OUT) $(if $(DRY),--dry-run)

# Its run cache is bench/results/paper/run_cache, which git ignores: remove it to compute all anew.
paper: $(VENV)/installed
	$(BIN)/python -m gem_fast table1 --seeds $(SEEDS) --out bench/results/paper
	$(BIN)/python -m gem_fast table3 --seeds $(SEEDS) --out bench/results/paper
	$(BIN)/python -m gem_fast table2 --seeds $(SEEDS) --out bench/results/paper $(CIFAR:%=--cifar %)
	$(BIN)/python -m gem_fast figure1 --seeds $(SEEDS) --out bench/results/paper $(CIFAR:%=--cifar %)
	$(BIN)/python -m gem_fast descriptors --seeds $(SEEDS) --samples-per-task 300 --memory-batch 16 --out bench/results/paper

soak: $(VENV)/installed $(VENV)/test.tools $(VENV)/soak.tools
	cd tests && OPENBLAS_NUM_THREADS=1 ../$(BIN)/python -m soak.solver --seed $(SEED) --problems $(PROBLEMS)
	cd tests && ../$(BIN)/python -m soak.leak --steps $(STEPS)
	cd tests && ../$(BIN)/python -m soak.large
	cd tests && SANITIZER_ROUNDS=1000 ../$(BIN)/python -m pytest csrc/test_sanitizers.py
	cd tests && for target in operators idx checkpoint cifar; do \
	    ../$(BIN)/python -m fuzz.run $$target -seed=$$(($(SEED) + 1)) -max_total_time=$(FUZZ_SECONDS) || exit 1; done

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build out *.egg-info gem_fast/*.so

# gem_fast itself, built and installed in place: Python files are used as they stand.
$(VENV)/installed: $(BUILD) | $(BIN)/pip
	$(BIN)/pip install --quiet '$(TORCH)' -e '.[demo]'
	touch $@

$(VENV)/%.tools: pyproject.toml $(VENV)/installed
	$(BIN)/pip install --quiet --group $*
	touch $@

# The frameworks, and by a path file the gem_fast that stands in this folder: it is not built again.
$(INTEGRATIONS)/installed: pyproject.toml $(VENV)/installed
	$(BIN)/python -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --upgrade pip
	$(INTEGRATIONS)/bin/pip install --quiet --group integrations
	echo '$(CURDIR)' > "$$($(INTEGRATIONS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gem_fast.pth"
	touch $@

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gem_fast needs Python 3.10 or newer, got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "making a virtual environment failed: install the venv module (on Debian or Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
