PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help .venv demo test fuzz fuzz-nightly test-transformers-4 lint types check bench clean
.PHONY: compile-report compile-report-3.6 compile-report-newest compile-report-table

help:
	@echo "make demo   pre-train a tiny BERT on this machine, by the recipe fast"
	@echo "make check  lint, types and tests (none needs a GPU)"
	@echo "make test-transformers-4  exported tokenizers under transformers 4"
	@echo "make fuzz, fuzz-nightly  100 or 1,000 random inputs of each kind"
	@echo "make compile-report  compile every kernel for A100 and H100; list registers, spills, counts"
	@echo "make compile-report-3.6, compile-report-newest  the same with the Triton of torch 2.11, 2.15"
	@echo "make compile-report-table  all three, their counts accepted, the tables of kernels/README.md"
	@echo "make bench  time a training step on this CPU"
	@echo "make clean  remove caches and builds; .venv and runs stay"

.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fastbert needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# 1.8M tokens: in under 3 minutes on 2 cores, and some 1.8 nats below the unigram model; 1.4 with the
# recipe's own lengths, an eighth of 128 first, which were chosen for half as many steps.
demo: $(INSTALLED)
	$(BIN)/fastbert pretrain --recipe fast --tokens-per-batch 2048 --max-steps 900 \
		--curriculum 1/4:0.3,1/2:0.3

# Two workers with one thread each: more only fight for the cores of a small machine. A file stays
# with one worker, for what its tests share; the longest come first.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# 20 cases of each kind are in `make test`.
fuzz: FASTBERT_FUZZ = 100
fuzz-nightly: FASTBERT_FUZZ = 1000
fuzz fuzz-nightly: $(INSTALLED)
	OMP_NUM_THREADS=1 FASTBERT_FUZZ=$(FASTBERT_FUZZ) $(BIN)/python -m pytest -q \
		$(wildcard tests/test_fuzz.py tests/test_bad_data.py)

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# Users of version 4, on which the engine itself does not run, get the tokenizer that was trained on.
test-transformers-4: build/transformers-4.57.6/.installed
	PYTHONPATH=$(<D) $(BIN)/python -c 'import transformers as t; assert t.__version__ == "4.57.6"'
	PYTHONPATH=$(<D) $(BIN)/python -m pytest -q tests/data/test_tokenizer_export.py

build/transformers-%/.installed: $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(@D) \
		transformers==$* huggingface-hub==0.36.2 tokenizers==0.22.2 requests urllib3 idna certifi \
		charset-normalizer
	@touch $@

check: lint types test

REPORT = $(BIN)/python -m fastbert_bench.kernels.compile_report --json build/$@.json $(ACCEPT)

compile-report: $(INSTALLED)
	$(REPORT)

compile-report-3.6: build/triton-3.6.0/.installed
	PYTHONPATH=$(<D) $(REPORT)

compile-report-newest: build/triton-3.9.0/.installed
	PYTHONPATH=$(<D) $(REPORT)

compile-report-table: ACCEPT = --accept
compile-report-table: compile-report-3.6 compile-report compile-report-newest
	$(BIN)/python -m fastbert_bench.kernels.compile_compare $(addprefix build/,$(^:=.json)) --readme

# The wheel alone, put before ours on the path: nothing that compiles a kernel needs its torch.
build/triton-%/.installed: $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(@D) triton==$*
	@touch $@

bench: $(INSTALLED)
	$(BIN)/fastbert bench step --device cpu

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
