# make html   runs every notebook top to bottom and writes its HTML into reports/
# make test   runs all tests
# make clean  removes what the two made, and nothing that is committed
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: html test theory-images clean
.DELETE_ON_ERROR:

html: $(VENV)/installed
	$(RUN) -m tools.run

test: $(VENV)/installed-tests
	$(RUN) -m pytest

theory-images: $(VENV)/installed
	$(RUN) -m tools.html images reports/theory

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
