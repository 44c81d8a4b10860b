# make demo, make test: on a machine with Python 3.10 or newer and nothing else, or with its own torch.
# PYTHON=python3.12 picks the Python, VENV=folder the virtual environment, TORCH_INDEX=url the index
# that torch comes from, PYTEST_ARGS="tests/test_config.py -k cache" the tests, JOBS the processes.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?= tests
TORCH_INDEX ?=
BIN := $(VENV)/bin
# mypy reads a package from its folders alone, so it is shown the layout of the installed one: links.
TYPES := $(abspath $(VENV))/types
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test page-test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	@$(BIN)/python -m gems_compile demo

# One thread a process: torch would start a thread a core in every one of them.
test: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --timeout 300 $(PYTEST_ARGS)

# Of explain's page: needs a Chromium (apt-get install chromium), without which half are skipped.
page-test: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs --timeout 300 tests/test_page.py tests/test_page_browser.py

lint: $(VENV)/.lint
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .
	@rm -rf $(TYPES)/gems_compile && mkdir -p $(TYPES)/gems_compile
	@ln -s $(CURDIR)/gems_compile/* $(CURDIR)/kernels $(CURDIR)/lowering $(TYPES)/gems_compile
	@cd $(TYPES) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p gems_compile

clean:
	rm -rf $(VENV) build dist *.egg-info

# A stamp an extra; each is made again when what it installs from has changed.
$(VENV)/.torch: constraints.txt .ci/venv
	@bash .ci/venv "$(PYTHON)" "$(VENV)" "$(TORCH_INDEX)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[interpreter]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	@$(BIN)/python -m pip install --quiet 'ruff>=0.12' 'mypy>=2'
	@touch $@
