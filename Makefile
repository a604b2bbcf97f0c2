# `make setup` once, then `make test`. Only python3.11 is needed; everything else goes into .venv.

PYTHON ?= python3.11
TORCH  := torch==2.13.0
BIN    := .venv/bin
STAMP  := .venv/.ready

unexport PYTHONDONTWRITEBYTECODE # else each process of the suite compiles the engine anew

.PHONY: setup test tests lint format demo docs wheel bench plots fuzz soak clients meanings targets score lock

setup: $(STAMP)

# The lock holds everything but torch, torch's own dependencies included. So torch, which has a
# build for every accelerator and thus no one hash, comes last and by plain pip brings only itself
# (and its CUDA libraries, where the chosen build has any). Of twelve thousand modules a quarter is
# ever imported, and compiled then.
$(STAMP): pyproject.toml requirements-dev.lock Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --no-compile --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install -qq --no-compile $(TORCH)
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	touch $(STAMP)

test: setup
	@$(MAKE) --no-print-directory -j2 tests lint # side by side, so that no core waits

# Among them is a proof of every family.
tests: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy engine

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Converts a genuine checkpoint (tp 2 × pp 2) and loads the result with transformers.
demo: setup
	$(BIN)/python tests/support/demo.py

# Builds the documentation site into build/docs; a warning is an error.
docs: setup
	$(BIN)/python -m pip install -qq --require-hashes -r requirements-docs.lock
	$(BIN)/python -m sphinx -q -b html -W --keep-going docs build/docs
	@echo "built build/docs/index.html"

# Builds dist/*.whl, to be installed with pip.
wheel: setup
	$(BIN)/python -m build --no-isolation --wheel --outdir dist
	@ls dist/*.whl

# Tries every mutant and careless edit of every family, and writes docs/mutation-score.md; it takes an hour.
score: setup
	$(BIN)/python -m tests.score --write

# Takes anew what transformers' classes know, which `engine lint` asks.
targets: setup
	$(BIN)/python -m tests.support.targets

# Writes anew what bundled mappings mean, into meanings/ beside them; review the diff.
meanings: setup
	$(BIN)/python -m engine prove --all --write-meaning

bench: setup
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.stores
	$(BIN)/python -m benchmarks.dcp

# Measures how time grows, and draws it to benchmarks/*.svg; the one target that needs matplotlib.
plots: setup
	$(BIN)/python -m pip install -qq --require-hashes -r requirements-bench.lock
	$(BIN)/python -m benchmarks.scaling

# Random input for every reader, for so many minutes; `make test` tries a little of it.
FUZZ_MINUTES ?= 10
fuzz: setup
	$(BIN)/python -m tests.fuzz $(FUZZ_MINUTES)

# Every test at full depth, with its files on a disk; then kills runs at so many random moments, and sees that nothing
# is lost.
SOAK_KILLS ?= 200
soak: setup
	TMPDIR=$${TMPDIR:-/tmp} SOAK=1 $(BIN)/python -m pytest -q --timeout 1200
	$(BIN)/python -m tests.slurm
	$(BIN)/python -m tests.soak --kills $(SOAK_KILLS)
	$(BIN)/python -m tests.score
	$(BIN)/python -m tests.clients
	$(BIN)/python -m tests.oldest

# Programs of others on converted folders, each in an environment of its own; writes docs/clients.md. TOKENIZERS=DIR adds
# the releases' own tokenizers, OFFICIAL_CODE=DIR InternLM2's official classes.
clients: setup
	$(BIN)/python -m tests.clients

# Keeps the versions the lock has, unless pyproject.toml asks for others.
lock: setup
	$(BIN)/uv pip compile --quiet --python-version 3.11 --group dev --extra model pyproject.toml \
	  --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	  --no-emit-package torch --output-file requirements-dev.lock
	$(BIN)/uv pip compile --quiet --python-version 3.11 --group bench \
	  --constraints requirements-dev.lock \
	  --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	  --output-file requirements-bench.lock
	$(BIN)/uv pip compile --quiet --python-version 3.11 --group docs \
	  --constraints requirements-dev.lock \
	  --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	  --output-file requirements-docs.lock
