# Python >= 3.10 and pip are all that this needs; every target makes .venv first.
PYTHON ?= python3
BIN := .venv/bin
UI_PORT ?= 5000
TENSORBOARD_PORT ?= 6006

.PHONY: help .venv demo test slow soak lint format docs tutorials wheel ui benchmarks validate screenshots clean

# What there is, from the lines above the targets.
help:
	@awk '/^# /{what = substr($$0, 3)} /^[a-z]+:/{sub(":.*", ""); printf "make %-12s %s\n", $$0, what; what = ""}' Makefile

.venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "PYTHON is $(PYTHON), $$($(PYTHON) --version 2>&1); expected Python >= 3.10 (make PYTHON=python3.11 ...)"; exit 2; }
	@# Debian splits ensurepip off its Python: there, the pip of that Python fills the environment.
	$(PYTHON) -m venv --clear .venv || { $(PYTHON) -m venv --clear --without-pip .venv && \
	  $(PYTHON) -m pip --python .venv/bin/python install pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The main job: a model that turns from generalizing to memorizing, and a control that does not.
demo: .venv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mlflow run . --env-manager local --experiment-name "generalization to memorization"

# A file of tests at a time on each core, one thread each: more would only wait for each other.
# The tests.
test: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The tests of over a minute.
slow: .venv
	$(BIN)/python -m pytest -m slow

# At least fifty kills at random moments; half an hour.
soak: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_soak.py -s

# Style, and types.
lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The style, applied.
format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pages that come from the code are written anew first.
# The site, into site/; strict: a warning is an error.
docs: .venv
	$(BIN)/python docs/build_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The tutorials, run; their pages show what they print and draw.
tutorials: .venv
	$(BIN)/python docs/run_tutorials.py

# Source distribution and wheel in dist/, checked.
wheel: .venv
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist build
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*

# MLflow UI and TensorBoard on what the demo left; Ctrl-C ends both.
ui: .venv
	@PATH="$(CURDIR)/$(BIN):$$PATH" UI_PORT=$(UI_PORT) TENSORBOARD_PORT=$(TENSORBOARD_PORT) $(BIN)/python -m trainers.experiments.ui

# What things cost, as ratios against named baselines measured in the same run.
BENCHMARKS := import_time measurement trainer ranks draws memory host_memory \
	kernel_counts monitoring distances trackers export device
benchmarks: .venv
	for name in $(BENCHMARKS); do BENCHMARK_RESULTS=docs/benchmarks.json $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.results

# Needs Fashion-MNIST (Debian: apt install dataset-fashion-mnist) and CIFAR-10: the hub's, or VALIDATION_CIFAR10=a folder or
# archive. Takes hours, and goes on where it was stopped, run by run and within a run.
# docs/validation.md from trainings and simulations.
validate: .venv
	$(BIN)/python -m studies.validation

# The pictures in README.md, from the latest demo; needs Chromium (Debian: apt install chromium).
screenshots: .venv
	$(BIN)/python docs/screenshots.py

# The environment and what builds left.
clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
