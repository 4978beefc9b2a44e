# From a fresh clone, `make gguf` and `make test` set up whatever is missing.

PYTHON ?= python3
MODEL  ?= demo
POLICY ?= ewq
SECONDS ?= 600
VENV   := .venv
EWQ    := $(VENV)/bin/ewq
# The backend that was set up last stays the default.
BACKEND ?= $(or $(shell cat $(VENV)/.backend 2>/dev/null),cpu)
PACKAGES := $(VENV)/.packages

.DEFAULT_GOAL := help
.PHONY: help setup gguf test check fuzz bench frontier clean

help:
	@echo "make setup [BACKEND=cpu|cuda|metal|vulkan]   set up .venv and build llama.cpp"
	@echo "make gguf  [MODEL=demo] [POLICY=ewq] [BUDGET=6GiB] [OUT=FILE] [FORCE=1]"
	@echo "                                             plan, make and verify a GGUF file"
	@echo "make test  [ARGS=...]                        run all tests (ARGS go to pytest)"
	@echo "make check                                   ruff, mypy and the direction of imports"
	@echo "make fuzz  [SECONDS=600]                     hostile headers, indexes and configs"
	@echo "make bench                                   make docs/results.md, compare with other"
	@echo "                                             tools, measure the speed of everything"
	@echo "make frontier                                make docs/frontier.md: size against divergence"
	@echo "make clean                                   remove .venv and build products"

# The build in the cache may have gone since, or belong to another CACHE: asking for it
# each time costs a fraction of a second when it is there.
setup: $(PACKAGES)
	@$(EWQ) setup --backend $(BACKEND) > /dev/null
	@echo $(BACKEND) > $(VENV)/.backend

$(PACKAGES): pyproject.toml constraints.txt
	@echo "setup: Python packages into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ewq: setup: $(PYTHON): is missing or older than 3.11; install Python 3.11 or later, or run make PYTHON=python3.11" >&2; exit 4; }
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(VENV)/bin/python -m pip install -qq -c constraints.txt -e ".[all,dev]"
	@touch $@

gguf: setup
	@$(EWQ) gguf "$(MODEL)" --policy "$(POLICY)" $(if $(FORCE),--force) \
	  $(if $(BUDGET),--budget "$(BUDGET)") \
	  $(if $(OUT),-o "$(OUT)")

test: setup
	@$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

check: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/python -m pytest -q tests/test_imports.py

fuzz: setup
	@$(VENV)/bin/python tests/fuzz_readers.py --seconds $(SECONDS)

bench: setup
	@$(VENV)/bin/python -m benchmarks.results
	@$(VENV)/bin/python -m benchmarks.scan
	@$(VENV)/bin/python -m benchmarks.plan
	@$(VENV)/bin/python -m benchmarks.optimal
	@$(if $(EWQ_TEXT_DIR),$(VENV)/bin/python -m benchmarks.bench 8)
	@$(if $(EWQ_MMLU_DIR),$(VENV)/bin/python -m benchmarks.mmlu marketing 50 BF16)
	@$(if $(EWQ_MMLU_DIR),$(if $(EWQ_TEXT_DIR),$(VENV)/bin/python -m benchmarks.calibration))
	@$(if $(EWQ_MMLU_DIR),$(VENV)/bin/python -m benchmarks.lm_eval)

frontier: setup
	@$(VENV)/bin/python -m benchmarks.frontier

# The user's cache stays: it may be shared, and can be deleted by hand (docs/reproducibility.md).
clean:
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find ewq_gguf tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "clean: .venv and build products removed; the cache is left as it is"
