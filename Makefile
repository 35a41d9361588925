# make demo    distil the toy teacher on this machine's CPU and draw the comparison
# make test    the whole test suite
# make lint    ruff and mypy
# Each sets up .venv by itself, once.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(RUN) -m toy.demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/.ready: pyproject.toml requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
