# make test      ruff and pytest
# make book      executes every page and builds the book
# make pages     the book, and a look at each page in Chromium, wide and narrow: does all fit and load?
# make results PROFILE=pack [ITEM=08_near_ood] [OPTIONS="-p seeds 1"]
#                measures; the only writer of results/
# make bench     measures speed; bench-folders, bench-memory, bench-precision and prove (Ray, damage) what
#                their names say;
#                each writes into benchmarks/
# All make .venv first, with the versions of requirements.lock. make LOCK= takes the newest versions
# that pyproject.toml allows instead, make EXTRAS=fast,ray the optional packages too. Nothing is
# redone that is not out of date.
PYTHON ?= python3
VENV ?= .venv
LOCK ?= requirements.lock
EXTRAS ?=
BIN := $(VENV)/bin
# the pages of the book; the others stay for the profile paper
PAGES := $(shell sed -n 's|.*file: \(notebooks/.*\)|book/\1.ipynb|p' book/_toc.yml)
CODE := $(shell find dlsr -type f -not -path '*/__pycache__/*')
RESULTS := $(shell find results -type f) $(wildcard benchmarks/*.csv benchmarks/*.log)
TEXT := $(shell find book -type f -not -path '*/__pycache__/*' -not -path 'book/notebooks/*')
BOOK := _build/html/index.html
OLDEST := $(if $(LOCK),3.11,3.10)
# threads that wait for work leave the cores to the page beside
export OMP_WAIT_POLICY := PASSIVE
ifeq ($(PROFILE)$(filter results,$(MAKECMDGOALS)),results)
$(error Say which profile: make results PROFILE=pack)
endif
.DELETE_ON_ERROR:
.PHONY: book executed pages test results bench bench-folders bench-memory bench-precision prove clean

book: $(VENV)/installed
	@$(MAKE) --no-print-directory -j2 executed
	@$(MAKE) --no-print-directory $(BOOK)
	@echo "The book lies in $(abspath $(BOOK))"

pages: book $(VENV)/installed-pages
	$(BIN)/python book/check_pages.py _build/html

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

results: $(VENV)/installed
	$(BIN)/python book/make_results.py --profile $(PROFILE) $(ITEM) $(OPTIONS)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/reduced.py

bench-precision: $(VENV)/installed
	$(BIN)/python benchmarks/precision.py

bench-folders: $(VENV)/installed
	$(BIN)/python benchmarks/own_folders.py

bench-memory: $(VENV)/installed
	$(BIN)/python benchmarks/memory.py

prove: $(VENV)/installed
	$(BIN)/python benchmarks/prove_cluster.py
	$(BIN)/python benchmarks/prove_unbreakable.py

executed: $(PAGES)

$(VENV)/installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit("Python $(OLDEST) or newer is needed; run: make PYTHON=python3.12" \
	  if sys.version_info < tuple(map(int, "$(OLDEST)".split("."))) else 0)'
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCK),)
	$(BIN)/python -m pip install --editable ".[test]"
else
	$(BIN)/python -m pip install --requirement $(LOCK)
	$(BIN)/python -m pip install --no-deps --editable .
endif
ifneq ($(EXTRAS),)
	$(BIN)/python -m pip install $(if $(LOCK),--constraint $(LOCK)) --editable ".[$(EXTRAS)]"
endif
	@touch $@

$(VENV)/installed-pages: $(VENV)/installed
	$(BIN)/python -m pip install $(if $(LOCK),--constraint $(LOCK)) --editable ".[pages]"
	@touch $@

# A page is executed with its default profile, aside, and comes into the book when it succeeded.
$(PAGES): book/notebooks/%.ipynb: notebooks/%.ipynb $(CODE) $(RESULTS) $(VENV)/installed
	@mkdir -p book/notebooks _build/pages
	@echo "$< is executed"
	@$(BIN)/papermill --kernel python3 --no-progress-bar --log-level WARNING $< _build/pages/$*.ipynb
	@mv _build/pages/$*.ipynb $@

# -W: a warning fails the build; --all: else numbers glued from other pages may be stale
$(BOOK): $(PAGES) $(TEXT) $(RESULTS) _config.yml
	$(BIN)/jupyter-book build -W -n --keep-going --all --path-output . book
	$(BIN)/python book/check_links.py _build/html
	@touch $@

clean:
	rm -rf _build book/notebooks
