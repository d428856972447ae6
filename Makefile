# make html   runs every notebook top to bottom and writes its HTML into reports/
# make test   runs all tests
# make clean  removes what the two made, and nothing that is committed
# make submission NAME="Your Name" ID=StudentNumber   packs what is handed in, if it is fit to be (README, "Handing it in")
# make rerun  unpacks that elsewhere, makes a fresh environment, runs every notebook and compares every number
# make robustness  runs every notebook under hard conditions: other folders, no network, cut off and started again
# make bench  times the deformable convolution against others and stores the numbers
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# A variable of the command line as the shell's own, so that quotes in it do no harm; one of the environment does not count.
given = $(if $(findstring command,$(origin $(1))),"$$$(1)")

.PHONY: html test robustness bench theory-images submission rerun clean
.DELETE_ON_ERROR:

html: $(VENV)/installed
	$(RUN) -m tools.run

test: $(VENV)/installed-tests
	$(RUN) -m pytest

robustness: $(VENV)/installed-tests
	$(RUN) -m pytest tests/robustness.py

bench: $(VENV)/installed
	$(RUN) -m tools.bench

theory-images: $(VENV)/installed
	$(RUN) -m tools.html images reports/theory

submission: $(VENV)/installed
	$(RUN) -m tools.submission build --name=$(call given,NAME) --id=$(call given,ID) \
		--collaborators=$(call given,COLLABORATORS) $(if $(filter 1,$(ALLOW_STANDIN)),--allow-standin)

rerun: $(VENV)/installed
	$(RUN) -m tools.submission rerun --zip=$(call given,ZIP)

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-tests: $(VENV)/installed tests/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) reports/standin data/standin-* data/checkpoints
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
