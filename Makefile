# `make demo` and `make test` each work as the first and only command after `git clone`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format clean

demo: $(INSTALLED)
	$(BIN)/gpipe train examples/clip_digits.yaml --resume # from the start in a new clone; goes on where it was stopped
	$(BIN)/gpipe eval runs/clip_digits

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

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

clean:
	rm -rf $(VENV) build dist *.egg-info runs
