# `make demo` and `make test` each work as the first and only command after `git clone`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The oldest torch that gpipe promises to work with, and of what only training needs YAML alone, for files of costs.
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed
OLDEST_PACKAGES := 'torch==2.11.*' 'torchvision==0.26.*' numpy pytest pytest-xdist hypothesis ninja pyyaml

SPREAD := -n auto --dist loadfile --no-loadscope-reorder
SIMULATED := -p gpipe.testing.accelerators --accelerators 4
# Tests of devices have processes of their own: a process that has simulated accelerators has them for good.
WITHOUT_DEVICES := --ignore-glob='*/test_gpu*.py' --ignore-glob='*/test_simulated_*.py'
HAS_ACCELERATOR := -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'
# Files that import nothing beyond what $(OLDEST) has: the runtime, the models, the partitioning.
OF_TRAINING := ^ *(import|from) +(gpipe\.training|benchmarks|tiny_run|yaml|pydantic|typer|rich|sklearn|safetensors|matplotlib|tensorboard|open_clip)
OF_RUNTIME = $(filter-out tests/test_gpu% tests/test_simulated_% tests/test_packaging.py,$(shell grep -LE '$(OF_TRAINING)' tests/test_*.py))

SIMULATED_TESTS := $(wildcard tests/test_simulated_*.py)

# $(call test_devices,folder of the interpreter,files for simulated accelerators): tests/test_gpu* run on real ones where
# there are any, on simulated ones elsewhere.
define test_devices
	if $(1)/python $(HAS_ACCELERATOR); then \
		$(1)/python -m pytest -m 'not rare' tests/test_gpu*.py && \
		$(1)/python -m pytest $(SIMULATED) -m 'not rare' $(2); \
	else \
		$(1)/python -m pytest $(SIMULATED) -m 'not rare' tests/test_gpu*.py $(2); \
	fi
endef

.PHONY: demo test test-slow test-oldest check format clean

demo: $(INSTALLED)
	$(BIN)/gpipe train examples/clip_digits.yaml --resume # from the start in a new clone; goes on where it was stopped
	$(BIN)/gpipe eval runs/clip_digits

test: $(INSTALLED)
	$(BIN)/python -m pytest $(SPREAD) $(WITHOUT_DEVICES) -m 'not rare'
	$(call test_devices,$(BIN),$(SIMULATED_TESTS))

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest $(SPREAD) $(WITHOUT_DEVICES) -m rare
	$(BIN)/python -m pytest $(SIMULATED) -m rare $(SIMULATED_TESTS)

test-oldest: $(OLDEST_INSTALLED)
	$(OLDEST)/bin/python -m pytest $(SPREAD) -m 'not rare' $(OF_RUNTIME)
	$(call test_devices,$(OLDEST)/bin,$(filter-out tests/test_simulated_training.py,$(SIMULATED_TESTS)))

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[train,dev]'
	touch $@

$(OLDEST_INSTALLED): pyproject.toml Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(OLDEST_PACKAGES) --editable .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info runs
