# make demo, make test: each creates .venv, installs all it needs, and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint format bench docs clean .venv
help:
	@echo "make demo    install, plan DLRM-DCNv2 for 128 H100, then plan and train a small one here"
	@echo "make test    install and run the test suite"
	@echo "make lint    ruff, mypy --strict, import direction"
	@echo "make bench   run every benchmark and write docs/benchmarks.md"
	@echo "make docs    build the site into docs/_build/html; a warning is an error"

.venv: $(INSTALLED)

# torchrec declares the CUDA build of FBGEMM as a dependency; the CPU build is in the extra, so
# torchrec itself is installed without dependencies. recbole is only a carrier of MovieLens-100K.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -e ".[torchrec-cpu,dev,docs]"
	$(BIN)/python -m pip install --quiet --no-deps "torchrec==1.8.0" "recbole==1.2.1"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks.all

docs: $(INSTALLED)
	@$(BIN)/sphinx-build -q -W -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache build dist
