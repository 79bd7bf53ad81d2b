# Two commands: `make prune` runs the main job, `make test` the tests. Both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Spinning OpenMP threads slow two processes at once down by up to 20x.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install prune test browser test-browser test-extras test-quantize test-engines test-triton lint docs gpu-wheels clean

install: $(VENV)/.installed

# constraints.txt pins torch==2.13.0, so that a machine's own CPU wheel is used and nothing with CUDA is fetched.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

prune: install
	$(BIN)/minipuzzle prune

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# A browser for tests/test_browser.py, by apt if there is none; without apt those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { command -v apt-get >/dev/null \
	  && timeout 300 sh -c 'apt-get update -qq && apt-get install -y -qq chromium chromium-driver' >/dev/null 2>&1; } \
	  || echo "no chromium, and apt did not bring it: the browser tests will be skipped"

test-browser: install browser
	$(BIN)/python -m pytest tests/test_browser.py

# Every extra that installs without CUDA, installed into an environment of its own and used once; needs the network.
# -> benchmarks/results/extras.json
EXTRAS := build/extras
test-extras:
	$(PYTHON) -m venv --clear $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(EXTRAS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval,track,quantize,docs]'
	HF_HUB_OFFLINE=1 $(EXTRAS)/bin/python benchmarks/extras.py

# The checkpoints of `minipuzzle quantize`, by modelopt in an environment of its own; needs the network.
# -> benchmarks/results/quantize.json
QUANTIZE := build/quantize
test-quantize:
	$(PYTHON) -m venv --clear $(QUANTIZE)
	$(QUANTIZE)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(QUANTIZE)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[quantize]'
	HF_HUB_OFFLINE=1 $(QUANTIZE)/bin/python benchmarks/quantize.py

# llama.cpp from the source distribution of llama-cpp-python: the library is compiled (minutes on one core), the
# converter is in its source. Once, into the user's cache; needs the network, cmake and a C++ compiler.
# -> benchmarks/results/engines.json
LLAMA_VERSION := 0.3.36
LLAMA := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/minipuzzle/llama-cpp-python-$(LLAMA_VERSION)
$(LLAMA)/.built:
	mkdir -p $(LLAMA)/source
	test -x $(LLAMA)/venv/bin/python || $(PYTHON) -m venv $(LLAMA)/venv
	cd $(LLAMA) && venv/bin/python -m pip download -q --disable-pip-version-check --no-deps \
	  --no-binary llama-cpp-python llama-cpp-python==$(LLAMA_VERSION)
	tar xzf $(LLAMA)/llama_cpp_python-$(LLAMA_VERSION).tar.gz -C $(LLAMA)/source --strip-components 1
	$(LLAMA)/venv/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==4.57.6 \
	  'numpy<3' 'sentencepiece<0.3' 'protobuf<5'
	CMAKE_BUILD_PARALLEL_LEVEL=1 CMAKE_ARGS=-DLLAVA_BUILD=OFF nice $(LLAMA)/venv/bin/python -m pip install -q \
	  --disable-pip-version-check $(LLAMA)/source
	touch $@

test-engines: install $(LLAMA)/.built
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/engines.py

# mamba-ssm's Triton kernels in Triton's interpreter, on a CPU, against our float64 reference, in an environment of its
# own; needs the network (triton unpacks to 1 GB). mamba-ssm comes as its Python files: nothing is compiled.
# -> benchmarks/results/triton.json
TRITON := build/triton
test-triton:
	$(PYTHON) -m venv --clear $(TRITON)
	$(TRITON)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel packaging ninja
	$(TRITON)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt triton==3.9.0 einops -e .
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(TRITON)/bin/python -m pip install -q --disable-pip-version-check \
	  --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
	$(TRITON)/bin/python benchmarks/triton_kernels.py

# The API reference, from the docstrings -> build/docs
docs: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/pdoc -o build/docs -d google $$(find minipuzzle -name '*.py' ! -name '_*' | sort | sed 's|/|.|g; s|\.py$$||')

# What a machine with a GPU and no network lacks -> build/wheels; docs/guide.md, section 6
gpu-wheels: install
	$(BIN)/python benchmarks/gpu/wheels.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
