# Every target makes its own virtual environment and installs what it needs into it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CHECKED = .venv-sanitize
HUB = .venv-hub

.PHONY: grid test sanitize hub bench faults parity report lint clean

grid: $(VENV)/installed
	$(BIN)/python -m ablations.run --grid

# One process either interprets Triton's kernels or does not, so there are two runs; each has a worker a core.
test: $(VENV)/installed-test
	@export OMP_NUM_THREADS=1; passed=0; \
	$(BIN)/pytest -n auto --dist worksteal || passed=1; \
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto --dist worksteal tests/interpreter tests/kernels/regions || passed=1; \
	exit $$passed

# What a GPU would do, by the IR of the kernels: out of bounds, races, what nobody wrote, and 16 bits.
sanitize: $(CHECKED)/installed-ttsem
	OMP_NUM_THREADS=1 $(CHECKED)/bin/pytest -n auto --dist worksteal tests/sanitize

# What `python -m kernels.bench.hub` writes, loaded by Hugging Face's package in an environment of its own.
hub: $(VENV)/installed-test $(HUB)/installed-kernels
	OMP_NUM_THREADS=1 DYHEAD_HUB_PYTHON=$(abspath $(HUB)/bin/python) $(BIN)/pytest tests/kernels/bench/hub

bench: $(VENV)/installed-test
	$(BIN)/pytest --benchmark-only

# Kill, fill, cut and set back what a grid stands on, and see what is lost: results/faults/. Ten minutes.
faults: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/main.py

# Every detector as a program of ONNX, torch.export and torch.compile, against itself: results/export/. Half an hour.
parity: $(VENV)/installed-test
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests/support/detectors $(BIN)/python tests/parity/main.py
	OMP_NUM_THREADS=1 DYHEAD_EXPORTS=1 $(BIN)/pytest tests/kernels/block/test_aoti.py tests/heads/onnx

report: $(VENV)/installed
	$(BIN)/python -m ablations.report $(DIR)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(CHECKED) $(HUB) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[ablations]'
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/installed

# tests/sanitize/requirements.txt says why what this package declares that it needs is passed over.
$(CHECKED)/installed-ttsem: pyproject.toml constraints.txt tests/sanitize/requirements.txt
	$(MAKE) VENV=$(CHECKED) $(CHECKED)/installed-test
	$(CHECKED)/bin/pip install --no-deps --ignore-requires-python -r tests/sanitize/requirements.txt
	touch $@

# tests/kernels/bench/hub/requirements.txt says why it is not the environment of the other tests.
$(HUB)/installed-kernels: constraints.txt tests/kernels/bench/hub/requirements.txt
	$(PYTHON) -m venv $(HUB)
	$(HUB)/bin/pip install -c constraints.txt -r tests/kernels/bench/hub/requirements.txt
	touch $@
