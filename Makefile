# Targets:
#   make html        run every notebook top to bottom and write its page into reports/
#   make test        lint, then run all tests
#   make lint        check style and format of all Python code, notebooks included
#   make estimate    count what the profiles for GPUs cost on common cards
#   make bench       time the deformable convolution against others and store the numbers
#   make drawn       train four small Changers: what holds the drawn one back? (about 20 minutes)
#   make figures     draw the figures of the theory
#   make theory      write reports/theory.html
#   make theory-images   write the theory as PDF and page images (needs Chromium)
#   make fuzz        feed the readers broken images, annotations, results and notebooks
#   make robustness  run every notebook under hard conditions (minutes): other folders, cut off
#   make submission NAME="Your Name" ID=StudentNumber   pack what is handed in, if it is fit to be
#   make rerun       unpack that elsewhere, run every notebook afresh, compare every number
#   make clean       remove caches and the outputs of stand-in runs
#   make distclean   also remove the environment, checkpoints and demonstration runs
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

# A variable of the command line as the shell's own, so that quotes in it do no harm; one of the
# environment does not count.
given = $(if $(findstring command,$(origin $(1))),"$$$(1)")

.PHONY: help html test lint estimate bench drawn figures theory theory-images fuzz robustness \
	submission rerun clean distclean
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

estimate: $(VENV)/installed
	$(RUN) -m tools.estimate

bench: $(VENV)/installed
	$(RUN) -m tools.bench

drawn: $(VENV)/installed
	$(RUN) -m tools.drawn

figures: $(VENV)/installed
	$(RUN) -m theory.make_figures

theory: $(VENV)/installed
	$(RUN) -m tools.html theory reports/theory.html

theory-images: $(VENV)/installed
	$(RUN) -m tools.html images reports/theory

fuzz: $(VENV)/installed-tests
	$(RUN) -m pytest tests/fuzz.py

robustness: $(VENV)/installed-tests
	$(RUN) -m pytest tests/robustness.py

submission: $(VENV)/installed
	$(RUN) -m tools.submission build --name=$(call given,NAME) --id=$(call given,ID) \
		--collaborators=$(call given,COLLABORATORS) $(if $(filter 1,$(ALLOW_STANDIN)),--allow-standin)

rerun: $(VENV)/installed
	$(RUN) -m tools.submission rerun --zip=$(call given,ZIP)

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/installed-tests: $(VENV)/installed tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	touch $@

clean:
	rm -rf reports/standin reports/unfinished data/standin-* .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) data/checkpoints reports/demo
