# A python3 whose torch sees a GPU is used as it is; on any other machine everything goes into .venv.
ifeq ($(shell python3 -c "import torch; print(torch.cuda.is_available())" 2>/dev/null),True)
BIN :=
STAMP := build/.installed
else
BIN := .venv/bin/
STAMP := .venv/.installed
endif
PYTHON := $(BIN)python3

CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := pyproject.toml CMakeLists.txt setup.py $(CSRC)

.PHONY: test bench lint install clean

test: install
	$(PYTHON) -m pytest tests

bench: install
	$(PYTHON) -m benchmarks adapter --quick
	$(PYTHON) -m benchmarks train --quick

lint: install
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)clang-format --dry-run -Werror $(CSRC)

install: $(STAMP)

build/.installed: $(BUILD_INPUTS)
	python3 -m pip install --no-build-isolation --no-deps -e .
	@touch $@

# torch goes first and pinned, so that no later step resolves to another build of it.
.venv/.installed: $(BUILD_INPUTS)
	python3 -m venv .venv
	$(PYTHON) -m pip install torch==2.13.0
	$(PYTHON) -m pip install triton==3.6.0
	$(PYTHON) -m pip install -e ".[test,bench,dev]"
	@touch $@

clean:
	rm -rf build .venv *.egg-info mtlora_kernels/_C.*.so
