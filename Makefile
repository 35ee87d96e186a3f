# Every target makes its own virtual environment and installs what it needs into it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: grid test bench report lint clean

grid: $(VENV)/installed
	$(BIN)/python -m ablations.run --grid

test: $(VENV)/installed-test
	$(BIN)/pytest

bench: $(VENV)/installed-test
	$(BIN)/pytest --benchmark-only

report: $(VENV)/installed
	$(BIN)/python -m ablations.report $(DIR)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[ablations]'
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/installed
