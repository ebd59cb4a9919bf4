# `make metainit` and `make test` do all of their own set-up; each needs only Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
ARGS ?=

.PHONY: metainit gradinit nio test test-slow check benchmark supported docs linkcheck clean
metainit: $(READY)
	$(RUN) -m reproduce.metainit_cifar10 $(ARGS)

gradinit: $(READY)
	$(RUN) -m reproduce.gradinit_cifar10 $(ARGS)

nio: $(READY)
	$(RUN) -m reproduce.nio_cifar10 $(ARGS)

test: $(READY)
	$(RUN) -m pytest $(ARGS)

test-slow: $(READY)
	$(RUN) -m pytest -m slow $(ARGS)

check: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff check --isolated --select F821 reproduce benchmarks  # names; off elsewhere for jaxtyping's strings
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	$(VENV)/bin/lint-imports

benchmark: $(READY)
	$(RUN) -m benchmarks.metainit $(ARGS)
	$(RUN) -m benchmarks.gradinit $(ARGS)
	$(RUN) -m benchmarks.nio $(ARGS)
	$(RUN) -m benchmarks.derivatives $(ARGS)
	$(RUN) -m benchmarks.unroll $(ARGS)

supported: $(READY)
	$(RUN) -m benchmarks.supported $(ARGS)

# The checkout is the source folder, so that the READMEs are pages where they stand.
docs: $(READY)
	$(RUN) -m sphinx -W --keep-going -c docs -d docs/_build/trees $(ARGS) . docs/_build/html

# External links, over the network; the tests check all others.
linkcheck: $(READY)
	$(RUN) -m sphinx -b linkcheck -c docs -d docs/_build/trees $(ARGS) . docs/_build/linkcheck

clean:
	rm -rf $(VENV)

# The stamp is written last: an environment cut off half-way is built again, and so is one older than its description.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, got " + \
	    sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)
