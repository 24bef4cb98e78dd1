# Everything a developer or CI needs, from a clean clone, with only Python 3.11 or newer, pip and make.
#   make demo    serve a small model and watch it being balanced      make check   the quick part of the tests
#   make test    everything that CI runs                              make bench   every benchmark
#   make serve   serve a small model with vLLM and balancing, on a CPU, at port 8000
#   make soak    simulate clusters of ranks with every fault until stopped
#   make layers  what can be tested of the backends for devices without one, in some minutes
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEPENDENCIES := $(VENV)/.dependencies-installed
PROJECT      := $(VENV)/.project-installed
VLLM         := .venv-vllm
ASCEND       := .venv-ascend
NIXL         := .nixl
LAYERS       := $(addprefix tests/,unit/test_device_symbols.py ascend/test_symbols.py ascend/test_hccl_options.py \
  $(addprefix unit/test_,accelerator.py accelerator_backend.py collective_transfer.py nixl_group.py simulated_accelerator.py) \
  processes/test_backend_contract.py processes/test_accelerator_contract.py processes/test_forward_exchange.py)
ENGINES      := .engines
KERNEL_TESTS := $(addprefix tests/unit/test_,adaptive.py algorithms.py deepseek.py dispatch.py planning.py schedule.py)
# One thread for each process: the tests run several ranks on few cores.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check audit lint unit simulation soak layers processes kernels wheel vllm vllm-tests ascend ascend-tests engines engines-tests nixl-tests serve bench clean

help:
	@sed -n '1,6p' Makefile

install: $(PROJECT)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] \
	  + ": make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(DEPENDENCIES): ci/requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r ci/requirements.txt
	@touch $@

$(PROJECT): pyproject.toml $(DEPENDENCIES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -rf *.egg-info  # seen before the installed one from here, and never refreshed
	@touch $@

demo: $(PROJECT)
	$(BIN)/eplb demo $(DEMO_OPTIONS)

lint: $(PROJECT)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

unit: $(PROJECT)
	$(BIN)/python -m pytest -q tests/unit

check: $(PROJECT)
	$(MAKE) --jobs=2 --output-sync=target lint unit

# Many ranks in one process with every fault, and each rule broken once to see that it shows.
SEEDS ?= 2000
simulation: $(PROJECT)
	$(BIN)/python -m pytest -q tests/simulation
	$(BIN)/python -m eplb_platform.testing.cluster --seeds $(SEEDS)

soak: $(PROJECT)
	$(BIN)/python -m eplb_platform.testing.cluster --soak

# Known vulnerabilities of what is installed; says why where it cannot be known, and fails only for a found one.
audit: $(PROJECT)
	$(BIN)/python ci/audit.py

# The compiled kernels as plain Python: what the compiler may hide (an index out of range) raises here.
kernels: $(PROJECT)
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -q $(KERNEL_TESTS) -k "not left_to_compile"

wheel: $(PROJECT)
	$(BIN)/python ci/wheel.py

processes: $(PROJECT)
	$(BIN)/python -m pytest -q -rs tests/processes tests/cuda

# vLLM pins other versions of what we use, hence an environment of its own, with its own compiled kernels.
# Says why where it cannot be had.
vllm-tests serve: export NUMBA_CACHE_DIR := $(CURDIR)/$(VLLM)/numba-cache
vllm: $(PROJECT)
	$(BIN)/python ci/vllm_environment.py --environment $(VLLM)

# No prerequisite: make would start the other parts of `test` before it comes back to this one, the longest.
vllm-tests: $(PROJECT)
	@$(MAKE) --no-print-directory vllm
	@if [ -e $(VLLM)/.unavailable ]; then echo "SKIPPED tests/vllm: $$(cat $(VLLM)/.unavailable)"; \
	  else set -x; $(VLLM)/bin/python -m pytest -q tests/vllm; fi

# The vendor's torch_npu, which makes `import torch` fail where CANN is not, hence an environment of its own.
ascend: $(PROJECT)
	$(BIN)/python ci/ascend_environment.py --environment $(ASCEND)

layers: $(PROJECT)
	EPLB_ASCEND_ENVIRONMENT=$(ASCEND) $(BIN)/python -m pytest -q -rs $(LAYERS)

ascend-tests: ascend
	EPLB_ASCEND_ENVIRONMENT=$(ASCEND) $(BIN)/python -m pytest -q -rs --ignore tests/ascend/over_stub tests/ascend
	EPLB_ASCEND_ENVIRONMENT=$(ASCEND) $(BIN)/python tests/ascend/cann_stub/run.py -m pytest -q -rs tests/ascend/over_stub

# SGLang's and vllm-ascend's own EPLB modules, unpacked and nothing more, against which our files are tested.
# Says why where they cannot be had.
engines: $(PROJECT)
	$(BIN)/python ci/engine_packages.py --folder $(ENGINES)

engines-tests: engines
	EPLB_ENGINES=$(ENGINES) $(BIN)/python -m pytest -q -rs tests/engines

# NIXL, 340 MB, which nothing else needs: beside the environment, and not part of `test`.
$(NIXL)/.installed: ci/requirements-nixl.txt | $(PROJECT)
	rm -rf $(NIXL)
	$(BIN)/python -m pip install --quiet --no-deps --target $(NIXL) -r ci/requirements-nixl.txt
	@touch $@

nixl-tests: $(NIXL)/.installed
	PYTHONPATH=$(CURDIR)/$(NIXL) $(BIN)/python -m pytest -q -rs tests/processes/test_nixl.py \
	  tests/processes/test_accelerator_migration.py

serve: vllm
	@if [ -e $(VLLM)/.unavailable ]; then cat $(VLLM)/.unavailable; exit 1; fi
	PYTHON=$(VLLM)/bin/python examples/vllm/serve.sh $(SERVE_OPTIONS)

# Two parts at a time: most wait for processes to start, for time-outs, and, at first, for the environments to
# be fetched. What others publish overnight fails no build.
test:
	$(MAKE) --jobs=2 vllm lint unit ascend engines
	$(MAKE) --jobs=2 vllm-tests processes simulation ascend-tests engines-tests kernels wheel
	-$(MAKE) audit

bench: $(PROJECT)
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
