PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

NATIVE := $(shell find backends/native -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.py' -o -name '*.t[ox][mt]*' \))

.PHONY: demo test bench docs figures experiment fuzz lint clean

demo: .venv/ready  ## train a small model with SA attention, compare the backends on its scores
	$(BIN)/python examples/demo.py

test: .venv/ready lint  ## all tests, three files at a time: some wait for processes of their own
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile

bench: .venv/ready  ## the kernels against named peers, on this machine
	$(BIN)/sa-softmax bench --report bench.json --plot bench.png

docs: .venv/ready  ## the documentation site, in docs/_build/html; warnings are errors
	$(PIP) sphinx furo myst-parser
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -b html docs docs/_build/html

figures: .venv/ready  ## the pictures of the documentation: some minutes
	$(BIN)/python docs/figures

experiment: .venv/ready  ## the paper's claims, measured: softmax, product and normalized attention side by side
	$(BIN)/python examples/experiment

fuzz: .venv/ready  ## random calls of the kernels, under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PIP) cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S backends/native -B build/fuzz -G Ninja -DSA_SOFTMAX_FUZZ=ON -DSA_SOFTMAX_SANITIZE=address,undefined
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/fuzz --target fuzz
	build/fuzz/fuzz 20000

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and by itself: whatever asks for it later then finds the pinned build in place.
.venv/ready: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sa-softmax needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) ./backends/native
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf backends/native/build docs/_build tests/clients/node_modules examples/browser/node_modules
