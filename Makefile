# Two commands set everything up: `make demo` and `make test`. Both keep to .venv and out/.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
PIP    := .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

SUITE  := .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
# Of a test with more cases `make test` runs so many, and `make rest` the others with the tests that take long.
CASES  := 1
# The `compat` targets run all of both; with SOME="--few 1" only what `make test` runs.
SOME   ?=

.PHONY: help demo ci test rest examples docs package lint fuzz slow compat compat-isa compat-nocompiler clean

help:
	@echo "make demo   simulate, train at full resolution, evaluate; leaves out/demo/report.html"
	@echo "make test   lint and the ordinary tests, of each one case (under 10 minutes)"
	@echo "make rest   the other cases (longer); make ci runs both"
	@echo "make examples   the scripts of examples/"
	@echo "make package   the wheel and the source archive, installed and tried"
	@echo "make docs   the documentation as a site in out/site; its code is run"
	@echo "make fuzz   random search for wrong numbers (long)"
	@echo "make slow   tests that need minutes or many gigabytes"
	@echo "make compat             the ordinary tests with the lowest, the pinned and the newest torch"
	@echo "make compat-isa         the ordinary tests with no more than AVX2, on any x86-64 processor"
	@echo "make compat-nocompiler  the ordinary tests without a C++ compiler"
	@echo "make lint   ruff, pyright and the import floors alone"

demo: .venv/app.stamp
	.venv/bin/python -m cosmictagger demo --out out/demo

# What continuous integration runs.
ci: test rest examples docs package

test: lint
	$(SUITE) --few $(CASES)

rest: .venv/test.stamp
	$(SUITE) --rest $(CASES)

examples: .venv/examples.stamp
	$(SUITE) -m examples tests/test_examples.py

# A page that is read asks no other host for anything.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet --site-dir out/site
	! grep -rlE '(src|<link[^>]* href)="https?:' out/site --include=*.html
	$(SUITE) -m docs tests/test_docs.py

# Later Pythons are looked at by the type checker alone.
package: .venv/test.stamp
	.venv/bin/pyright --pythonpath .venv/bin/python --pythonversion 3.14
	.venv/bin/python -m pytest -m package tests/test_package.py

lint: .venv/test.stamp
	.venv/bin/ruff check src tests $(wildcard bench examples)
	.venv/bin/ruff format --check src tests $(wildcard bench examples)
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports --no-cache

fuzz: .venv/test.stamp
	.venv/bin/python -m pytest -m fuzz

slow: .venv/test.stamp
	.venv/bin/python -m pytest -m slow

# An environment for each release of torch, made and removed one after the other. The releases may be named:
# make compat TORCH="2.11.0 2.13.0"
TORCH ?= 2.11.0 2.13.0 2.14.1
compat: .venv/bin/python
	@for release in $(TORCH); do \
	  folder=$$(mktemp -d) && grep -v '^torch' constraints.txt > $$folder/constraints.txt && begun=$$(date +%s) && \
	  $(PYTHON) -m venv $$folder/venv && $$folder/venv/bin/python -m pip install --quiet \
	    --constraint $$folder/constraints.txt torch==$$release --editable '.[cosmictagger,test]' && \
	  $$folder/venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(SOME); status=$$?; \
	  rm -rf $$folder; echo "torch $$release: status $$status, $$(( $$(date +%s) - begun )) s"; \
	  [ $$status = 0 ] || exit $$status; \
	done

# Every library's own limit, and that of our kernels.
compat-isa: .venv/test.stamp
	FULLFRAME_CPU_ISA=x86-64-v3 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  $(SUITE) $(SOME)

# A path on which nothing is found.
compat-nocompiler: .venv/test.stamp
	PATH= $(SUITE) $(SOME)

clean:
	rm -rf .venv out

# A stamp is newer than what it was installed from, so a second make starts at once.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fullframe needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/app.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cosmictagger]'
	@touch $@

.venv/test.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cosmictagger,test]'
	@touch $@ .venv/app.stamp

.venv/examples.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cosmictagger,test,examples]'
	@touch $@ .venv/app.stamp .venv/test.stamp

.venv/docs.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[cosmictagger,test,docs]'
	@touch $@ .venv/app.stamp .venv/test.stamp
