# make demo: install, then fine-tune, sample and evaluate the embedded model. make test: all that CI checks.
PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test test-slow test-browser test-faults fuzz check docs docs-serve compare-algos clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dirl needs Python 3.11 or newer: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (a few minutes the first time)"
	@$(BIN)/pip install -qq -c constraints.txt $(PIP_FLAGS) -e '.[dev]'
	@$(BIN)/pip install -qq -c constraints.txt $(PIP_FLAGS) -e '.[gym]' || \
	    echo "reasoning-gym is not installed, for which a C compiler is needed: tests of data=gym will be skipped"
	@touch $@

demo: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

check: install
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo "Reformat with $(BIN)/ruff format"; exit 1; }
	@$(BIN)/mypy

# What LMDeploy's contract tests need; without it, as where it has no wheel, they are skipped.
.venv/lmdeploy: tests/lmdeploy.txt | install
	@$(BIN)/pip install -qq --no-deps $(PIP_FLAGS) -r $< && touch $@ || echo "LMDeploy is not there: its tests are skipped"

# SGLang's released code for its contract tests, in a directory of its own: nothing else is to import it.
.venv/sglang: tests/sglang.txt | install
	@rm -rf $@ && $(BIN)/pip install -qq --no-deps --target $@ $(PIP_FLAGS) -r $< && touch $@ || echo "SGLang is not there: its tests are skipped"

# Likewise what lm-evaluation-harness takes: sixteen packages, a hundred megabytes of tasks among them.
.venv/lm_eval: tests/lm_eval.txt | install
	@$(BIN)/pip install -qq --no-deps $(PIP_FLAGS) -r $< && touch $@ || echo "lm-eval is not there: its tests are skipped"

# And what builds the pages as a site.
.venv/docs: pyproject.toml constraints.txt | install
	@$(BIN)/pip install -qq -c constraints.txt $(PIP_FLAGS) -e '.[docs]' && touch $@ || echo "MkDocs is not there: the site's tests are skipped"

# And two of the trackers.
.venv/tracking: tests/tracking.txt | install
	@$(BIN)/pip install -qq --no-deps $(PIP_FLAGS) -r $< && touch $@ || echo "Trackio and MLflow are not there: their tests are skipped"

test: check .venv/lmdeploy .venv/sglang .venv/lm_eval .venv/docs .venv/tracking
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

# And what runs the notebooks.
.venv/notebooks: pyproject.toml constraints.txt | install
	@$(BIN)/pip install -qq -c constraints.txt $(PIP_FLAGS) -e '.[notebooks]' && touch $@ || echo "nbclient is not there: the notebooks are skipped"

# And what packs weights into 4 bits.
.venv/qlora: pyproject.toml constraints.txt | install
	@$(BIN)/pip install -qq -c constraints.txt $(PIP_FLAGS) -e '.[qlora]' && touch $@ || echo "bitsandbytes is not there: its tests are skipped"

test-slow: install .venv/tracking .venv/notebooks .venv/qlora
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m 'slow and not gpu and not faults and not browser'

# Of the page that `dirl view` writes, in a headless Chromium: apt-get install chromium chromium-driver
test-browser: install
	@$(BIN)/pytest -m browser -rs tests/viewer

# Ends with a table of what was tried, survived and lost; in minutes.
test-faults: install
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m faults tests/faults

# Mutated files, overrides, answers and checkpoints; what breaks something is left in FINDINGS.
MINUTES ?= 60
FINDINGS ?= runs/fuzz
fuzz: install
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --findings $(FINDINGS)

# The pages as a site: site/index.html. The variable silences what MkDocs' future is feared to be.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: .venv/docs
	@$(BIN)/mkdocs build --strict

docs-serve: .venv/docs
	@$(BIN)/mkdocs serve

compare-algos: install
	@$(BIN)/python -m benchmarks.compare_algos

clean:
	rm -rf .venv dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
