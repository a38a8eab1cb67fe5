# make demo, make test, make check, make study: each sets up .venv first, once. make PYTHON=python3.12
# picks a Python; PIP_ARGS reaches pip, say with the index of a smaller torch.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
SHELL := /bin/sh

# A new stamp for other requirements or another folder (an editable install points to its folder).
KEY := $(shell (pwd; cat pyproject.toml constraints.txt) | cksum | cut -d' ' -f1)
STAMP := .venv/installed-$(KEY)
BIN := .venv/bin

.PHONY: demo study test coverage lint types check format clean distclean
.DELETE_ON_ERROR:

demo: $(STAMP)
	rm -rf demo-out
	$(BIN)/cskd-pipeline demo --out demo-out

# A teacher, its cache, and students trained every way on pages of digits; see docs/study.md.
# STUDY_ARGS reaches the command: --seeds 5, --shards and --val-shards of CIFAR-10. Run it again to
# go on.
STUDY_OUT ?= study-out
STUDY_ARGS ?=

study: $(STAMP)
	$(BIN)/cskd-pipeline study --out '$(STUDY_OUT)' $(STUDY_ARGS)

# One process more than two cores: many tests wait for processes, signals and deadlines of their own.
TEST_PROCESSES ?= 3

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadscope $(PYTEST_ARGS)

coverage: PYTEST_ARGS += --cov --cov-report=term
coverage: test

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/python -m mypy

check: lint types test

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp comes last, so a set-up that was interrupted is gone through again; pip keeps what it had
# finished, and a .venv without a working pip is made anew.
$(STAMP):
	@$(CHECK_PYTHON)
	@echo "setting up .venv; with torch this takes minutes and some GB, once"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@rm -f .venv/installed-*
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) \
		-c constraints.txt -e '.[demo,dev]'
	@touch $@

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }

# A Python named on the command line replaces a .venv of another one.
ifeq ($(origin PYTHON),command line)
VERSION := -c 'import sys; print(sys.version)' 2>/dev/null
ifneq ($(shell $(PYTHON) $(VERSION)),$(shell $(BIN)/python $(VERSION)))
$(STAMP): another-python
endif
endif

.PHONY: another-python
another-python:
	@$(CHECK_PYTHON)
	rm -rf .venv

clean:
	rm -rf demo-out build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis
	find cskd_pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
