# make demo   the demo, in a virtual environment of its own
# make test   the tests, all of them or TESTS, with the newest packages or with PACKAGES
# make lint   style and types
PYTHON ?= python3
VENV ?= .venv
RUFF = $(VENV)/bin/ruff

.PHONY: demo test lint format
demo: $(VENV)/installed-images
	$(VENV)/bin/adv2 demo

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest $(TESTS)

lint: $(VENV)/installed-dev
	$(RUFF) check --config "line-length = 100" --config "lint.pycodestyle.max-line-length = 132" --select E,F,W,I,B,UP,C4,SIM,D1,RUF --ignore D105,D107,RUF001,RUF002,RUF003 \
		--per-file-ignores 'tests/*:D,notebooks/*:D' .
	$(RUFF) format --line-length 100 --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed-dev
	$(RUFF) format --line-length 100 .

$(VENV)/bin/python: # the newest pip resolves in half the time
	$(PYTHON) -m venv --upgrade-deps $(VENV)

# most of what is installed is never imported; what is, is compiled at its first import and kept
$(VENV)/installed-%: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --no-compile $(PACKAGES) -e '.[$*]'
	touch $@
