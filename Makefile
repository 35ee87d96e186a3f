# Every target makes its own virtual environment and installs what it needs into it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: grid test bench report lint clean

grid: $(VENV)/installed
	$(BIN)/python -m ablations.run --grid

# One process either interprets Triton's kernels or does not, so there are two runs; each has a worker a core.
test: $(VENV)/installed-test
	@export OMP_NUM_THREADS=1; passed=0; \
	$(BIN)/pytest -n auto --dist worksteal || passed=1; \
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto --dist worksteal tests/interpreter tests/kernels/regions || passed=1; \
	exit $$passed

bench: $(VENV)/installed-test
	$(BIN)/pytest --benchmark-only

report: $(VENV)/installed
	$(BIN)/python -m ablations.report $(DIR)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
