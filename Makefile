# make demo, make test, make check, make study: each sets up .venv if needed. make PYTHON=python3.12
# selects a Python; PIP_ARGS are passed to pip, for example the index of a smaller torch.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
SHELL := /bin/sh
# The tests start hundreds of processes, each of which would compile this package.
unexport PYTHONDONTWRITEBYTECODE

# The stamp changes with the requirements and the folder, to which an editable install points.
KEY := $(shell (pwd; cat pyproject.toml constraints.txt) | cksum | cut -d' ' -f1)
STAMP := .venv/installed-$(KEY)
BIN := .venv/bin

.PHONY: demo study test coverage lint types check format clean distclean
.DELETE_ON_ERROR:

demo: $(STAMP)
	rm -rf demo-out
	$(BIN)/cskd-pipeline demo --out demo-out

# Train a teacher, its cache, and students with every method on pages of digits; see docs/study.md.
# STUDY_ARGS are passed on: --seeds 5, --shards and --val-shards of CIFAR-10. Run it again to resume.
STUDY_OUT ?= study-out
STUDY_ARGS ?=

study: $(STAMP)
	$(BIN)/cskd-pipeline study --out '$(STUDY_OUT)' $(STUDY_ARGS)

# One more process than two cores, since many tests wait for processes, signals and deadlines.
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

# The stamp is written last, so an interrupted setup is repeated; pip keeps finished packages, and a
# .venv without a working pip is recreated.
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

# A Python given on the command line replaces a .venv made with another.
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
