# What a change should pass before it is sent: style, types, the contracts of imports, and the fast tests.
PYTHON ?= .venv/bin/python

.PHONY: check fix test

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy -p mua_rl
	$(dir $(PYTHON))lint-imports
	$(PYTHON) -m pytest -q -m "not slow" -n 2 --dist loadfile

fix:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	$(PYTHON) -m pytest -q
