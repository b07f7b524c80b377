# Two commands for a new user: `make demo` and `make test`. The rest are conveniences.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test install lock lint format types imports coverage clean

demo: install # simulate, train, export, serve and replay; ONCE=1 stops after the summary
	$(BIN)/python deploy/demo/run.py $(if $(ONCE),--once)

# Two processes: most of the time goes into ONNX exports, which use one core each. tests/contract makes them, and comes
# first as the order is kept: of the modules that follow none takes long, so that the processes end together.
test: install lint types imports # everything .ci/run checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

install: $(STAMP)

# torch first and by itself: with it in place nothing else asks for another build of it.
$(STAMP): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 numpy --constraint requirements.lock
	$(BIN)/pip install --quiet --editable '.[serve,train,dev]' --constraint requirements.lock
	touch $@

lock: # write requirements.lock anew from pyproject.toml
	$(BIN)/pip-compile --quiet --extra serve --extra gpu --extra train --extra dev --strip-extras --allow-unsafe \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-annotate \
		--no-header --output-file requirements.lock pyproject.toml
	sed -i -e 's/+cpu$$//' -e '/^clickserve /d' requirements.lock

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

coverage: install # lines reached by the tests, and the slowest tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov --cov-report=term:skip-covered --durations=5

clean:
	rm -rf $(VENV) demo *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis
