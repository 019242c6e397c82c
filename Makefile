# `make demo` runs the main job on the bundled model and ends with its report, `make test` runs the tests. Each installs
# what it needs into .venv.
PYTHON ?= python3
VENV := .venv
VENV_TL3 := .venv-tl3
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-tl3 fuzz kill-test lint benchmark notebooks clean

demo: $(VENV)/installed
	$(BIN)/python -m finetune run micro
	$(BIN)/python -m analysis report

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto tests --ignore tests/benchmarks

# What to run while working: all but the tests that are marked slow.
test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -n auto -m "not slow" tests --ignore tests/benchmarks

# The tests of load_hooked, and those of analysis again, with TransformerLens 3; the report's show nothing more of it.
test-tl3: $(VENV_TL3)/installed
	$(VENV_TL3)/bin/python -m pytest -n auto tests/analysis --ignore-glob '*/test_report_*'

# Ten times as many examples of the fuzzing tests as in the suite.
fuzz: $(VENV)/installed
	$(BIN)/python -m pytest --hypothesis-profile fuzz tests/finetune/test_fuzz.py tests/finetune/test_fuzz_files.py

# Kills runs at 30 random moments and resumes them: a few minutes, and no part of the tests.
kill-test: $(VENV)/installed
	$(BIN)/python tests/force/kill.py

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Executes the notebooks in place and draws the README's figure; PNGs need Chrome or Chromium.
notebooks: $(VENV)/installed
	$(BIN)/python notebooks/execute.py
	$(BIN)/python notebooks/readme_figure.py

benchmark: $(VENV)/installed
	$(BIN)/python -m pytest -s tests/benchmarks

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.11 to 3.13 is needed; say which with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into $(VENV), once: a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,logging,eval,gguf,lora,notebooks,png]'
	@touch $@

# Nothing but TransformerLens 3 and what it alone needs, over the packages of the first environment.
$(VENV_TL3)/installed: $(VENV)/installed constraints-tl3.txt
	$(BIN)/python -m venv --clear --without-pip $(VENV_TL3)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(VENV_TL3)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth
	$(BIN)/python -m pip --python $(VENV_TL3)/bin/python install --quiet --disable-pip-version-check \
	  --no-deps --requirement constraints-tl3.txt
	$(BIN)/python -m pip --python $(VENV_TL3)/bin/python check
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_TL3) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
