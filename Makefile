# make quickstart   a virtual environment, a small corpus, a Performer trained and evaluated
# make test         everything that this machine can run
# make test-long    proofs that take minutes: 100,000 damaged files, 2 GB of FASTA, runs killed at random, every change of
#                   world and stage
# make test-compiled    every Triton kernel compiled for sm_80, 89, 90 and 100 by two releases of Triton, with counts of
#                   instructions (all cases, a chip at a time: pytest -m "compiled and long" tests/gpu -k all-sm_90)
# make test-sanitized   the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make test-newest  the tests of other packages' interfaces, with the newest releases that pyproject.toml allows
# make test-oldest  the same, with the oldest that were tried (tests/environments)
# make check        lint, format, which way imports go, types, and the documentation with its links
# make docs         the documentation on http://localhost:8000
# make constraints  the releases that are in .venv now, as those that make installs from then on

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORPUS := data/synthetic.fasta.gz
RUN := quickstart-$(shell date +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-long test-newest test-oldest test-sanitized test-compiled check docs constraints clean

help:
	@sed -n 's/^# make /make /p' Makefile

install: $(VENV)/.runs

# Installed again only when the requirements change, so that everything below works offline from the second time on.
$(VENV)/.runs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.tests: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(CORPUS): | $(VENV)/.runs
	$(BIN)/longseq data synth $@ --families 32 --records 4000 --mean-length 120

quickstart: $(VENV)/.runs $(CORPUS)
	$(BIN)/longseq fit configs/protein/quickstart.yaml run.name=$(RUN) trainer.devices=2
	$(BIN)/longseq evaluate runs/$(RUN)
	@echo
	@echo "See its curves:    $(BIN)/tensorboard --logdir runs/$(RUN)/tensorboard"

# Some tests wait for what they disturb, those of SLURM most of the time: one process more than there are cores. Files
# that take longest come first. Tests start most processes warm (tests/warm.py).
PYTEST_PROCESSES = $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() + 1))')

test: $(VENV)/.tests
	@status=0; slurm=$$(mktemp); trap 'rm -f "$$slurm"' EXIT; \
	$(BIN)/python -m pytest -m "distributed and not long" tests/cluster >"$$slurm" 2>&1 & job=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not distributed and not long and not compiled" \
		--numprocesses $(PYTEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
		tests/ways tests/longseq/launch tests/longseq tests || status=1; \
	wait $$job || status=1; cat "$$slurm"; \
	$(BIN)/python -m pytest -m "distributed and not long" --numprocesses 3 --dist loadfile \
		$$(grep -rl --include='test_*.py' --exclude-dir=cluster 'mark\.distributed' tests | sort) || status=1; \
	exit $$status

test-long: $(VENV)/.tests
	LONGSEQ_TESTS_COLD=1 $(BIN)/python -m pytest -m "long and not compiled"

# By the Triton of constraints.txt, whose counts are in tests/gpu/ceilings.json, and by the newest release.
.triton-newest/.installed: | $(VENV)/.tests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton
	@touch $@

test-compiled: $(VENV)/.tests .triton-newest/.installed
	LONGSEQ_TRITON=$(CURDIR)/.triton-newest $(BIN)/python -m pytest -m "compiled and not long" tests/gpu

# The sanitizers' libraries must be in the process before Python starts.
test-sanitized: $(VENV)/.tests
	CXX=$(CURDIR)/tests/sanitized/g++ ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest tests/longseq/attention/test_native.py

# Of the packages a tenth is imported, and compiled to bytecode then; of the files of tests a tenth is collected.
test-newest test-oldest: test-%: tests/environments/%.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint $< --editable '.[test]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m "interfaces and not long" \
		$$(grep -rl --include='test_*.py' 'mark\.interfaces' tests | sort)

check: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python tools/reference.py
	$(BIN)/zensical build --strict

docs: $(VENV)/.tests
	$(BIN)/python tools/reference.py
	$(BIN)/zensical serve

# PyTorch's local tag (+cpu) goes, so that another build of the same release fits as well.
constraints: $(VENV)/.tests
	@{ sed -n '/^#/p; /^triton==/p' constraints.txt; $(BIN)/python -m pip list --format=freeze \
		| grep -viE '^(longseq|pip|setuptools|triton)==' | sed 's/+.*//' | sort -f; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) .triton-newest .venv-newest .venv-oldest .pytest_cache .mypy_cache .ruff_cache .cache site
