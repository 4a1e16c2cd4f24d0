# make setup       the environment, in .venv
# make reproduce   every notebook, into reproduced/ (PROFILE=smoke|laptop|gpu|paper)
# make test        every check
# make test-flower the Flower app's tests, in .venv-flower; part of make test
# make book        the site, into reproduced/book: notebooks with their stored outputs, docs, API, settings
# make test-book   builds the site and opens every page in a browser; part of make test
# make flower      results/flower.csv: a run over Flower's real processes, and one with a client killed
# make publish     for maintainers: figures/, results/headline.csv and the notebooks' stored outputs, five seeds
# make tuning      results/tuning.csv, tuned.yaml: 20 trials a method and start; about 9 hours on 2 cores
# make study       results/study.{csv,json}, the README's results: 2,620 runs; about 12 hours on 2 cores
# make transfer    notebook 06's figure: starts that were pretrained for fewer and fewer steps, on five seeds
# make theory      notebook 07's tables: gradient noise, stability and gaps, both starts, five seeds; about an hour and a half on two cores
# make why         the table and figures of docs/why-it-works.md, on five seeds
# make dp          results/dp.csv: accuracy against ε of differential privacy, on five seeds; about an hour and a half
# make audit       notebook 08's tables: membership attacks over 64 shadow runs; about half an hour
# make scale       notebook 09's table: up to 100 clients, and clients whose ViTs differ
#
# PYTHON=python3.12 picks the interpreter. On Linux, for the CPU build of torch:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup

PYTHON ?= python3
PROFILE ?= laptop

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
FLOWER := .venv-flower
FLOWER_STAMP := $(FLOWER)/.installed
BOOK := .venv-book
BOOK_STAMP := $(BOOK)/.installed
# Test files run side by side, on up to four cores, in the order given: xdist would begin with the one of most tests.
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
SITE := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-flower flower book test-book tuning study publish transfer theory why dp audit scale lint format weights clean

# A figure backend set for another program must not reach the notebooks.
unexport MPLBACKEND

help:
	@echo "make setup | reproduce [PROFILE=smoke|laptop|gpu|paper] | test | test-flower | flower | book | test-book | publish | tuning | study | transfer | theory | why | dp | audit | scale | lint | format | weights | clean"

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "fedmitr needs Python 3.10 or newer; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (minutes on the first call)"
	@$(PIP) install -q -r requirements.txt
	@$(PIP) install -q --no-deps -e .
	@touch $@

reproduce: setup
	$(BIN)/fedmitr reproduce --profile $(PROFILE)

# Bars appear after a second, so on a slow machine alone: notebooks are compared without them.
test: lint
	$(BIN)/python -m pytest $(SPREAD) tests/test_wheel.py tests  # the longest file first
	FEDMITR_PROFILE=smoke FEDMITR_JOBS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest $(SPREAD) --nbval --nbval-current-env --nbval-cell-timeout=600 \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks/*.ipynb
	@$(MAKE) --no-print-directory -j2 test-flower test-book  # side by side: each is mostly one process

# Left out, in one line, only where Flower cannot be installed: whatever fails after that is a failure.
test-flower: $(FLOWER_STAMP)
	@test ! -e $(FLOWER_STAMP) || $(FLOWER)/bin/python -m pytest tests/flower

flower: $(FLOWER_STAMP)
	@test -e $(FLOWER_STAMP)
	$(FLOWER)/bin/python tools/flower_run.py

# An environment beside $(VENV): packages of its own first, then fedmitr and all that $(VENV) has, torch among them.
# $(1): its folder; $(2): its pins; $(3): what is left out where they cannot be installed.
define environment
	@echo "Installing $(2) into $(1)"
	@rm -rf $(1) && $(BIN)/python -m venv $(1)
	@if $(1)/bin/python -m pip install --no-deps -r $(2) >$(1)/install.log 2>&1; then \
	  printf '%s\n' "$(CURDIR)" "$$($(BIN)/$(SITE))" >"$$($(1)/bin/$(SITE))/venv.pth" && touch $(1)/.installed; \
	else \
	  echo "$(3) left out: $(2) cannot be installed here, see $(1)/install.log" >&2; \
	fi
endef

# Flower's pins contradict requirements.txt.
$(FLOWER_STAMP): $(STAMP) requirements-flower.txt
	$(call environment,$(FLOWER),requirements-flower.txt,The Flower tests are)

# Sphinx and its extensions.
$(BOOK_STAMP): $(STAMP) requirements-book.txt
	$(call environment,$(BOOK),requirements-book.txt,The book is)

# Without a network, from the outputs that the notebooks store: nothing is run.
book: $(BOOK_STAMP)
	@test -e $(BOOK_STAMP)
	$(BOOK)/bin/python book/build.py

# Left out, in one line, only where the book's tools cannot be installed. Tests that need a browser say so.
test-book: $(BOOK_STAMP)
	@test ! -e $(BOOK_STAMP) || $(BOOK)/bin/python -m pytest -rs tests/book

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

publish: setup
	$(BIN)/python tools/publish.py

# Both go on from the tables that are there, and run nothing where these are complete.
tuning: setup
	$(BIN)/fedmitr tune

study: setup
	$(BIN)/fedmitr study
	$(BIN)/python tools/readme.py

# Validation images of the tuning seeds: a study of the start, not of who wins.
transfer: setup
	$(BIN)/python -m fedmitr.experiments.transfer

# What the theory claims, measured: each student is kept in the store, so a stopped run goes on.
theory: setup
	$(BIN)/python -m fedmitr.theory.experiment

why: setup
	$(BIN)/python tools/why.py

# Accuracy against ε. The other start: `python -m fedmitr.privacy.cost --starts vit_micro_early --out FILE`.
dp: setup
	$(BIN)/python -m fedmitr.privacy.cost
	$(BIN)/python tools/dp.py

# Each shadow run is kept in the store, so an audit that was stopped goes on.
audit: setup
	$(BIN)/fedmitr audit

# Trains the shared initial model again, the same after fewer steps, and the two for clients whose ViTs differ.
weights: setup
	$(BIN)/python -m fedmitr.experiments.pretrain --model vit_micro
	$(BIN)/python -m fedmitr.experiments.pretrain --model vit_micro_early
	$(BIN)/python -m fedmitr.experiments.pretrain --model vit_micro_patch6
	$(BIN)/python -m fedmitr.experiments.pretrain --model vit_micro_deep

# Notebook 09's table: up to 100 clients, and clients whose ViTs differ.
scale: setup
	$(BIN)/fedmitr sweep --method fedmitr_plus --cells results/scale.yaml --seeds 10-14 --out results/scale.csv

clean:
	rm -rf data/store reproduced
