# Targets:
#   make html        run every notebook top to bottom and write its page into reports/
#   make test        lint, then run all tests
#   make lint        check style and format of all Python code, notebooks included
#   make bench       time the deformable convolution against others and store the numbers
#   make drawn       train the Changer as drawn, beside a pooled one, and store the curves
#   make figures     draw the figures of the theory
#   make theory      write reports/theory.html
#   make theory-images   write the theory as PDF and page images (needs Chromium)
#   make submission NAME="Your Name" ID=StudentNumber   pack what is handed in, if it is fit to be
#   make rerun ZIP=HW3-Name-Number.zip   unpack that elsewhere and run every notebook afresh
#   make clean       remove caches and the outputs of stand-in runs
#   make distclean   also remove the environment, checkpoints and demonstration runs
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

# A variable of the command line as the shell's own, so that quotes in it do no harm; one of the
# environment does not count.
given = $(if $(findstring command,$(origin $(1))),"$$$(1)")

.PHONY: help html test lint bench drawn figures theory theory-images submission rerun clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# *\(make [a-z]\)/\1/p' Makefile

html: $(VENV)/installed
	$(RUN) -m tools.run

test: lint
	$(RUN) -m pytest

lint: $(VENV)/installed-tests
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

bench: $(VENV)/installed
	$(RUN) -m tools.bench

drawn: $(VENV)/installed
	$(RUN) -m tools.drawn

figures: $(VENV)/installed
	$(RUN) -m theory.make_figures

theory: $(VENV)/installed
	$(RUN) -m tools.page reports/theory.html

theory-images: $(VENV)/installed
	$(RUN) -m tools.page reports/theory

submission: $(VENV)/installed
	$(RUN) -m tools.submit --name=$(call given,NAME) --id=$(call given,ID) \
		--collaborators=$(call given,COLLABORATORS) $(if $(filter 1,$(ALLOW_STANDIN)),--allow-standin)

rerun:
	rm -rf build/rerun && mkdir -p build/rerun
	$(PYTHON) -m zipfile -e $(call given,ZIP) build/rerun
	cd build/rerun/HW3-* && $(MAKE) html

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/installed-tests: $(VENV)/installed tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	touch $@

clean:
	rm -rf build reports/standin reports/unfinished .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) data/checkpoints reports/demo
