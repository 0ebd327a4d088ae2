# `make demo` and `make test` need only Python >= 3.11, pip and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := holdfast tests benchmarks examples

.PHONY: demo test test-slow check audit lock soak wheel results docs clean

demo: .venv/demo.stamp
	$(BIN)/holdfast demo --out runs/demo

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow --timeout 3600

# What is packaged works without the sources beside it.
wheel: .venv/dev.stamp
	rm -rf build/wheel
	$(PIP) wheel --no-deps --wheel-dir build/wheel .
	$(PIP) install --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel && export PYTHONPATH=site && ../../$(BIN)/python -c \
		'import holdfast; assert "build/wheel/site" in holdfast.__file__, holdfast.__file__' \
		&& ../../$(BIN)/python -m pytest -c ../../pyproject.toml \
		../../tests/test_public.py ../../tests/report ../../tests/tasks/test_labels.py

# A site of the documents and docstrings in build/docs; a link that leads nowhere is an error.
docs: .venv/dev.stamp
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

# Every figure of the documents: its command, and the hours it took where they were kept.
results: .venv/demo.stamp
	@$(BIN)/python benchmarks/results.py

check: .venv/dev.stamp
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory audit

# Known weaknesses of what is tested, where pip-audit is installed and PyPI tells of them.
audit:
	@if $(BIN)/python -c 'import json, pip_audit, urllib.request as web; \
		json.load(web.urlopen("https://pypi.org/pypi/pip/24.0/json", timeout=4))["vulnerabilities"]' \
		2> /dev/null; \
	then sed 's/^torch==\([^+]*\)+cpu/torch==\1/' requirements.lock > .venv/audit.txt; \
		$(BIN)/python -m pip_audit --progress-spinner off --disable-pip -r .venv/audit.txt; \
	else echo 'not audited: needs pip-audit, and PyPI to tell of weaknesses'; fi

# What is installed for the tests, with hashes; needs uv.
lock: .venv/dev.stamp
	$(PIP) list --format=freeze | grep -v '^holdfast==' > .venv/tested.txt
	grep '^torch==' .venv/tested.txt > .venv/torch.txt
	uv pip compile pyproject.toml --extra dev -c .venv/tested.txt --override .venv/torch.txt \
		--python $(BIN)/python --generate-hashes --no-annotate --no-header -q -o .venv/lock.txt
	(sed -n '/^#/p' requirements.lock; grep -v '^ *#' .venv/lock.txt) > .venv/new.lock
	mv .venv/new.lock requirements.lock

# 1,000 kills at random moments, over days; stopped, it goes on.
soak: .venv/dev.stamp
	nice -n 10 $(BIN)/python benchmarks/soak.py --kills 1000 --json docs/results/soak.json

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python >= 3.11 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv

# torch first and exactly: any looser request fetches gigabytes of CUDA.
.venv/torch.stamp: constraints.txt | .venv/bin/python
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo.stamp

clean:
	rm -rf .venv build *.egg-info
