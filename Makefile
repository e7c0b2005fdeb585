PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo test slow format bench clean

# Score a few dialogues of each language with the small real model, and print the table.
demo: $(VENV)/runtime
	$(BIN)/python evaluate.py --ckpt smollm2-135m-instruct --limit 2 --rotations 1 --out results/demo

# Lint, and everything in tests/ that is not marked slow.
test: $(VENV)/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -m "not slow" tests

slow: $(VENV)/dev
	$(BIN)/python -m pytest -q -m slow tests

format: $(VENV)/dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/dev
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/stats.py

$(VENV)/runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
