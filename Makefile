# make bench: install into .venv, measure the suite `quick`, print its tables.
# make test:  install into .venv, run the tests.
# Both install once, and again when pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
ARGS ?=

# Of pip's settings only those that say where packages come from are kept; a target folder, a user
# installation or other constraints would end up in another environment than the pinned one. A
# configuration file is kept for its sources too; --user in it would not install into .venv.
PIP_SOURCES := PIP_CONFIG_FILE PIP_NO_INDEX PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS \
	PIP_TRUSTED_HOST PIP_KEYRING_PROVIDER PIP_CERT PIP_CLIENT_CERT PIP_PROXY PIP_CACHE_DIR \
	PIP_RETRIES PIP_DEFAULT_TIMEOUT PIP_TIMEOUT
unexport PYTHONHOME PYTHONPATH $(filter-out $(PIP_SOURCES),$(filter PIP_%,$(.VARIABLES)))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_USER := 0
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: bench test check clean help

bench: .venv/installed ## measure the suite quick and print its tables
	.venv/bin/bench run quick

test: .venv/installed-test ## run the tests (ARGS="-k loader" and the like are passed to pytest)
	.venv/bin/python -m pytest -n auto $(ARGS)

check: .venv/installed-test ## check format, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

clean: ## remove .venv, build products and caches; runs/ and results/ stay
	rm -rf .venv/installed* .venv build *.egg-info .benchmarks .coverage .hypothesis .mypy_cache .pytest_cache
	rm -rf .ruff_cache
	find bench cifar launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile
	@echo '  PYTHON=python3.12 after the target chooses the interpreter that .venv is made with.'

# .venv/.incomplete stands while an installation runs: where an earlier one was cut off, the next
# one starts from nothing.
.venv/installed-test: EXTRA := [test]
.venv/installed .venv/installed-test: pyproject.toml constraints.txt
	@if [ -e .venv/.incomplete ]; then rm -rf .venv/*; fi
	@if [ ! -x .venv/bin/python ]; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
			echo '$(PYTHON): missing or older than 3.11; add PYTHON=python3.12 or the like' >&2; \
			exit 1; }; \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
			echo '$(PYTHON): has no venv module; install it (Debian: python3-venv)' >&2; \
			exit 1; }; \
	fi
	@mkdir -p .venv && touch .venv/.incomplete
	@[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv
	@echo 'Installing the pinned packages into .venv; the first time this takes some minutes.'
	.venv/bin/python -m pip install --constraint constraints.txt --editable '.$(EXTRA)'
	@rm .venv/.incomplete && touch .venv/installed $@
