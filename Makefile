# make demo and make test are the two commands. Each makes .venv on first use.
PYTHON ?= python3
VENV   ?= .venv
ZOO    ?= .venv-zoo
ARGS   ?=

BIN      := $(VENV)/bin
STAMPS   := $(VENV)/stamps
MANIFEST := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo readme test lint format docs bench papers zoo clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(STAMPS)/demo  ## train an orthogonal RNN on real digits (options: ARGS="copy --rank 4")
	$(BIN)/python -m riemann_unn.demo $(ARGS)

readme: $(STAMPS)/demo  ## rerun the demos of README and rewrite their numbers and its picture (options: ARGS="--check")
	$(BIN)/python -m bench.readme $(ARGS)

test: lint $(STAMPS)/test  ## lint, then run the tests (options: ARGS="-k sketch")
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(STAMPS)/lint  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/lint  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMPS)/docs  ## build the documentation into docs/_build; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(STAMPS)/bench  ## time our optimizers beside their peers, 20 minutes (options: ARGS="--quick")
	$(BIN)/python -m bench.suite $(ARGS)

papers: $(STAMPS)/papers  ## rerun what the papers claim, 100 minutes (options: ARGS="--quick", ARGS="--only copy")
	$(BIN)/python -m bench.papers $(ARGS)

zoo: $(ZOO)/stamp  ## condition the models of torchvision, timm and transformers, 20 minutes (ARGS="--only resnet")
	OMP_NUM_THREADS=1 $(ZOO)/bin/python bench/zoo.py $(ARGS)

clean:  ## delete .venv and everything that was built
	rm -rf $(VENV) $(ZOO) build dist docs/_build bench/results.json .benchmarks .coverage* htmlcov \
	  .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find riemann_unn tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The zoo has an environment of its own: torchvision asks for another torch than the one pinned.
$(ZOO)/stamp: $(MANIFEST)
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install -q --disable-pip-version-check -e '.[zoo]'
	touch $@

# One environment; one stamp per extra says that the extra is installed in it.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(None if v >= (3, 10) else f"Python 3.10 or newer is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check 'pip>=23'
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/%: $(MANIFEST) | $(STAMPS)/venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
