# make book: executes the quickstart and the reports, and builds the book.  make test: ruff and pytest.
# Both make .venv first; nothing is redone that is not out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := book/notebooks/00_quickstart.ipynb
REPORTS := $(patsubst notebooks/%,book/notebooks/%,$(wildcard notebooks/3*.ipynb))
CODE := $(wildcard dlsr/*.py dlsr/*.json)
BOOK := _build/html/index.html
.DELETE_ON_ERROR:
.PHONY: book test clean

book: $(BOOK)
	@echo "The book lies in $(abspath $(BOOK))"

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("dlsr needs Python 3.10 or newer; run: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[test]"
	@touch $@

$(QUICKSTART): notebooks/00_quickstart.ipynb $(CODE) $(VENV)/installed
	$(BIN)/dlsr run 00_quickstart

# the reports read results/ alone: seconds each
$(REPORTS): book/notebooks/%.ipynb: notebooks/%.ipynb $(CODE) $(wildcard results/*.csv) $(VENV)/installed
	$(BIN)/dlsr run $*

# -W: a warning fails the build; --all: else numbers glued from other pages may be stale
$(BOOK): $(QUICKSTART) $(REPORTS) _config.yml $(shell find book results -type f -not -path '*/__pycache__/*') $(VENV)/installed
	$(BIN)/jupyter-book build -W -n --keep-going --all --path-output . book
	$(BIN)/python book/check_links.py _build/html
	@touch $@

clean:
	rm -rf _build $(QUICKSTART) $(REPORTS)
