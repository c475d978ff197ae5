# Every target makes its own set-up: a fresh machine needs only python3 (3.11 or newer, with venv) and make.
PYTHON ?= python3
VENV ?= .venv
# The torch to install. Where plain pip would fetch a CUDA build that you do not want, hand the index of the CPU build:
#   make demo TORCH="torch==2.13.0 --index-url URL"
TORCH ?= torch==2.13.0

# Test processes. The tests' models are too small for threads to help, so each process takes one.
JOBS ?= auto

BIN := $(VENV)/bin
READY := $(VENV)/.ready

# How long `make fuzz` tries random inputs.
MINUTES ?= 2

.PHONY: demo test test-slow browser fuzz kills lint fmt clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/condit demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 4 --dist worksteal

# The tests that need minutes (marker `slow`), which `make test` leaves out.
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 4 -m slow

# kill -9 of workers, drivers and nodes, KILLS of each; compares all files. Installs Ray.
KILLS ?= 20
kills: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[ray]'
	KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m slow tests/fuzz/test_job_kills.py

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --minutes $(MINUTES)

# The page in a real browser: needs chromium (apt install chromium).
browser: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[browser]'
	$(BIN)/python -m pytest -q -m browser tests/serve/test_browser.py

lint: $(READY)
	$(BIN)/ruff format --check src lab tests benchmarks
	$(BIN)/ruff check src lab tests benchmarks
	$(BIN)/pyright

fmt: $(READY)
	$(BIN)/ruff format src lab tests benchmarks
	$(BIN)/ruff check --fix src lab tests benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

# torch comes first and on its own, so that its source can be chosen; the range in pyproject.toml then keeps it.
# The stamp depends on both projects: a second run installs nothing.
$(READY): pyproject.toml lab/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "condit needs Python 3.11 or newer; run: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -e lab
	@touch $@
