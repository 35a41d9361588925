# make demo    distil the toy teacher on this machine's CPU and compare the two
# make test    the whole test suite
# make lint    ruff and mypy
# Each sets up .venv by itself, once, with the versions in constraints.txt.
# make test-oldest    the suite with the lower bounds of pyproject.toml, in .venv-oldest
# make test-newest    the suite with the newest versions that pyproject.toml allows, in .venv-newest
# Both set up their environment anew. TORCH=2.10 gives test-oldest another PyTorch than that of constraints.txt.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OLDEST := .venv-oldest
NEWEST := .venv-newest
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
SUITE := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-oldest test-newest lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(RUN) -m toy.demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) $(SUITE)

test-oldest:
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m tests.versions lowest torch==$(TORCH) > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install --quiet -e ".[dev]" -c $(OLDEST)/lowest.txt
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(SUITE)

test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet -e ".[dev]"
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(SUITE)

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/.ready: pyproject.toml requirements.txt constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt -c constraints.txt
	$(RUN) -m pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) runs
