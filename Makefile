# The two commands a newcomer needs: `make demo` and `make test`. Everything below them is made on first use.
PYTHON ?= python3
BIN := .venv/bin
# Quiet libraries, no network at run time, one thread per test process (two run side by side).
# Waiting threads sleep: spinning ones slow each other down tenfold where cores are shared.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
OLDER := .transformers-4.55
DOWNSTREAM := .downstream
MINIMAL := .minimal
MUTMUT := .mutmut
DEEPSPEED := .deepspeed
TRACKERS := .trackers
SITE := .site
# Those that can share an environment: tests/trackers/requirements-GROUP.txt
GROUPS ?= $(patsubst tests/trackers/requirements-%.txt,%,$(wildcard tests/trackers/requirements-*.txt))
# Its operators are compiled by ninja, into a folder of this directory's own.
WITH_DEEPSPEED = PYTHONPATH=$(DEEPSPEED) PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/built

DRAWS ?= 200
BASE ?= main
FIRST ?= $(shell date +%Y%m%d)000

.PHONY: help demo digits test test-newest test-older test-minimal test-engines test-trackers draws mutants downstream lint format docs site bench compare clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/installed ## train a small language model on Python's own source text (two to six minutes on two cores)
	@$(OFFLINE) $(BIN)/python examples/language_model.py $(ARGS)

digits: .venv/installed ## train a plain torch module on handwritten digits, without transformers
	@$(OFFLINE) $(BIN)/python examples/digits.py $(ARGS)

test: ## the whole suite: with transformers 4.55, then (also where that failed) with the newest
	@failed=; for each in test-older test-newest; do $(MAKE) --no-print-directory $$each || failed=1; done; test -z "$$failed"

test-newest: .venv/installed $(OLDER)/installed ## the whole suite with the newest transformers
	$(PYTEST) -n 2 --dist worksteal $(ARGS)

test-older: .venv/installed $(OLDER)/installed ## the tests that name transformers or peft, with 4.55
	PYTHONPATH=$(OLDER) $(PYTEST) -n 2 --dist worksteal tests/parity tests/surface tests/dropin \
		$$(grep -rlE 'transformers|peft' tests/loop tests/unit/checkpoint tests/unit/data --include='test_*.py') $(ARGS)

test-minimal: .venv/installed ## fresh environments: nothing but the project, then each extra alone (minutes, downloads)
	rm -rf $(MINIMAL)
	$(PYTHON) -m venv $(MINIMAL)/base
	$(MINIMAL)/base/bin/python -m pip install -q -c tests/minimal/constraints.txt torch
	$(MINIMAL)/base/bin/python -m pip wheel -q --no-deps -w $(MINIMAL) .
	$(MINIMAL)/base/bin/python -m pip install -q -c tests/minimal/constraints.txt $(MINIMAL)/*.whl
	TRAINWRIGHT_MINIMAL=$(CURDIR)/$(MINIMAL) $(PYTEST) -n 2 tests/minimal $(ARGS)
	rm -rf $(MINIMAL)

test-engines: .venv/installed $(DEEPSPEED)/installed ## DeepSpeed in several processes on the CPU (minutes; a C++ compiler)
	$(WITH_DEEPSPEED) $(PYTEST) tests/engines $(ARGS)

test-trackers: $(GROUPS:%=$(TRACKERS)/%/installed) ## each tracker's real package, offline (minutes, downloads; GROUPS=main)
	@failed=0; for group in $(GROUPS); do echo "Trackers of $$group"; \
		TRAINWRIGHT_TRACKERS=$$group $(OFFLINE) OMP_NUM_THREADS=1 $(TRACKERS)/$$group/bin/python -m pytest -q -n 2 --dist loadgroup \
			tests/trackers $(ARGS) || failed=1; done; exit $$failed

draws: .venv/installed ## 200 random configurations, stopped and resumed (DRAWS=200, FIRST=a number; others each day)
	TRAINWRIGHT_DRAWS=$(DRAWS) TRAINWRIGHT_FIRST_DRAW=$(FIRST) $(PYTEST) -n 2 tests/faults/test_any_configuration.py $(ARGS)

mutants: .venv/installed $(MUTMUT)/installed ## change one thing at a time where tests must notice (MUTANTS=name: one module; ten minutes)
	PYTHONPATH=$(CURDIR)/$(MUTMUT) $(OFFLINE) $(BIN)/python mutants/run.py $(MUTANTS) $(ARGS)

lint: .venv/installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed ## write the pages of arguments, optimizers and trackers from the code
	$(BIN)/python docs/generate_arguments.py
	$(BIN)/python docs/generate_optimizers.py
	$(BIN)/python docs/generate_trackers.py

site: $(SITE)/installed ## the documentation as a site, in .site/html (half a minute the first time; any warning fails)
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

bench: .venv/installed $(OLDER)/installed $(DOWNSTREAM)/installed ## all benchmarks, side by side with other trainers (ARGS=--quick: some minutes)
	@$(OFFLINE) $(BIN)/python benchmarks/bench.py $(ARGS)

compare: .venv/installed ## run 100 tiny configurations with two commits, compare bit by bit (BASE=main, ARGS="--only ema")
	@$(BIN)/python benchmarks/compare_commits.py $(BASE) $(ARGS)

downstream: .venv/installed $(DOWNSTREAM)/installed ## libraries that build on the Trainer, on both engines (minutes)
	PYTHONPATH=$(DOWNSTREAM) $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python downstream/compare.py $(ARGS)

clean: ## remove what make made
	rm -rf .venv $(OLDER) $(DOWNSTREAM) $(MINIMAL) $(MUTMUT) $(DEEPSPEED) $(TRACKERS) $(SITE) .mutants demo-output .pytest_cache .mypy_cache .ruff_cache

# torch first: later packages then find it and pull no other build.
.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv (about 2 GB, a few minutes)..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

# The older generation lies over the newest through PYTHONPATH, so that torch is installed once.
$(OLDER)/installed: tests/requirements-4.55.txt .venv/installed
	rm -rf $(OLDER)
	$(BIN)/python -m pip install -q --no-deps --target $(OLDER) -r $<
	touch $@

$(DOWNSTREAM)/installed: downstream/requirements.txt .venv/installed
	rm -rf $(DOWNSTREAM)
	$(BIN)/python -m pip install -q --no-deps --target $(DOWNSTREAM) -r $<
	touch $@

# The operator is compiled here, with a limit, and not within the first test.
$(DEEPSPEED)/installed: tests/requirements-deepspeed.txt .venv/installed
	rm -rf $(DEEPSPEED)
	$(BIN)/python -m pip install -q --no-deps --target $(DEEPSPEED) -r $<
	$(WITH_DEEPSPEED) $(BIN)/python tests/engines/prebuild.py
	touch $@

# Over what .venv has, torch above all; what a tracker needs in another release lies in front of it.
$(TRACKERS)/%/installed: tests/trackers/requirements-%.txt tests/trackers/constraints.txt .venv/installed
	rm -rf $(TRACKERS)/$*
	$(BIN)/python -m venv $(TRACKERS)/$*
	$(TRACKERS)/$*/bin/python tests/trackers/lay_over.py $(BIN)/python
	$(TRACKERS)/$*/bin/python -m pip install -q --no-compile -c tests/trackers/constraints.txt -r $<
	touch $@

# Without torch and the project: pages are text.
$(SITE)/installed: docs/requirements-site.txt
	rm -rf $(SITE)
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install -q -r $<
	touch $@

$(MUTMUT)/installed: mutants/requirements.txt .venv/installed
	rm -rf $(MUTMUT)
	$(BIN)/python -m pip install -q --no-deps --target $(MUTMUT) -r $<
	touch $@
