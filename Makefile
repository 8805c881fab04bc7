# Every target sets up what it needs in .venv; stamp files make a second call start at once.
#   make demo    fine-tune the built-in model with full fine-tuning, LoRA and QLoRA, and compare
#   make test    the test suite                make lint    every check pre-commit runs
#   make bench   measure against peers         make build   recompile what changed in csrc/

PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
PROJECT_FILES := pyproject.toml setup.py

# In CI a compiler warning fails the build; elsewhere compilers we never saw must be able to warn.
export QLK_BUILD_WERROR ?= $(if $(CI),1,0)

# With an NVIDIA driver: the default build, which is the CUDA one on Linux. Without: the CPU build
# where an index that pip knows has it (it is a tenth of the size), else the default build.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c .)
ifeq ($(filter-out 0,$(HAS_GPU)),)
TORCH_CHOICES := torch==$(TORCH)+cpu torch==$(TORCH)
else
TORCH_CHOICES := torch==$(TORCH)
endif

# The demo does not wait for nvcc where no GPU would run its code; a library that already has CUDA
# kernels keeps them.
HAS_CUDA_OBJECTS := $(wildcard build/native/kernels-*.cu-*.o)
DEMO_CUDA := $(or $(QLK_BUILD_CUDA),$(if $(filter-out 0,$(HAS_GPU))$(HAS_CUDA_OBJECTS),auto,0))

# Peers and integrations that the tests compare with; the demo needs none of them.
TEST_EXTRAS := dev,hf,bench,lab
# The compile tests run on it as well as on the newest: code generation differs.
OLD_TRITON := 3.6.0

.PHONY: setup build demo test bench lint format clean
.DELETE_ON_ERROR:

setup: $(STAMPS)/test

build: $(STAMPS)/package
	@$(BIN)/python setup.py -q build_ext --inplace

demo: $(STAMPS)/package
	@QLK_BUILD_CUDA=$(DEMO_CUDA) $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m qlora_kernels finetune

# Files of tests in several processes: most of them wait for Python or a compiler. Threads of kernels
# then share cores, and must not spin while they wait for each other.
TEST_PROCESSES ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); \
  echo $$((cores < 4 ? 2 : cores < 16 ? cores / 2 : 8)))

test: $(STAMPS)/test build
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS)

bench: $(STAMPS)/test build
	$(BIN)/python -m bench.run $(BENCH_ARGS)

lint: $(STAMPS)/test
	$(BIN)/python -m pre_commit run --all-files --show-diff-on-failure

format: $(STAMPS)/test
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks *.egg-info
	rm -f qlora_kernels/libqlora_kernels.so qlora_kernels/_not_built.txt
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/torch: | $(BIN)/python
	mkdir -p $(STAMPS)
	installed=; for torch in $(TORCH_CHOICES); do \
	  if $(PIP) install -q "$$torch"; then installed=1; break; fi; \
	  echo "make: no $$torch on this machine's package indexes"; \
	done; test -n "$$installed"
	touch $@

$(STAMPS)/package: $(PROJECT_FILES) $(STAMPS)/torch
	$(PIP) install -q "setuptools>=77" wheel
	QLK_BUILD_CUDA=$(DEMO_CUDA) $(PIP) install -q --no-build-isolation -e ".[plot]"
	touch $@

$(STAMPS)/test: $(STAMPS)/package
	$(PIP) install -q --no-build-isolation -e ".[$(TEST_EXTRAS)]"
	$(PIP) install -q --no-deps --target $(VENV)/triton-$(OLD_TRITON) --upgrade "triton==$(OLD_TRITON)"
	touch $@
