# What people and CI type. `make install` is the first step of every other target, and is done once. Tests run in two
# processes, a file in one of them, but for those that start Ray: one after another, each cluster takes the whole machine.
# Those of them that are slow wait much, for what they have killed to be missed: the other slow ones run beside them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONSTRAINTS ?= constraints.txt
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -ra --durations=12
BESIDE := $(VENV)/slow.log
WITH_RAY := $(VENV)/slow_with_ray.log
SHELL := bash
SPREAD := -n $(PROCESSES) --dist loadfile

.PHONY: help install demo test test-slow check format schema clean

help:
	@echo "make install     into $(VENV), with the exact versions of $(CONSTRAINTS)"
	@echo "make demo        text -> activations -> a trained dictionary -> a report"
	@echo "make test        the tests, but for those marked slow: make test-slow"
	@echo "make check       format, lint, types, layers"
	@echo "make format      write the format and the lint's fixes"
	@echo "make schema      write configs/schema.json from the settings"
	@echo "make clean       remove caches and builds; runs/, data/ and $(VENV) stay"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, once"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    $(CONSTRAINTS:%=--constraint %) --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/python jobs/run.py --config configs/quickstart.yaml

test: install
	$(PYTEST) $(SPREAD) -m "not slow and not cluster"
	$(PYTEST) -m "not slow and cluster"

test-slow: install
	nice -n 5 $(PYTEST) $(SPREAD) -m "slow and not cluster" > $(BESIDE) 2>&1 & beside=$$!; trap "kill $$beside" INT TERM; \
	$(PYTEST) -m "slow and cluster" 2>&1 | tee $(WITH_RAY); status=$${PIPESTATUS[0]}; \
	wait $$beside || status=1; cat $(BESIDE); echo "those with Ray, beside them, ended so:"; tail -n 15 $(WITH_RAY); \
	grep -hE "^(FAILED|ERROR|Fatal)" $(BESIDE) $(WITH_RAY); exit $$status

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: install
	$(BIN)/python -m xlc_ray.config.schema > configs/schema.json
	$(BIN)/python -m xlc_ray.config.schema sweep > configs/sweeps/schema.json

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
