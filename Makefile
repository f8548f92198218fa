# The tasks of this project; CI calls nothing else. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AUDIT := .venv-audit
DEMO := demo

.PHONY: help install demo test browser test-slow faults hostile lint bench docs clean lock sbom audit

help:  ## list the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## make .venv with everything pinned

$(STAMP): pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lesionflow needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install  ## make data, train in two processes, evaluate, export, serve and ask (5 minutes on 2 cores)
	$(BIN)/lesionflow data synth --out $(DEMO)/data --patients 300 --lesions 3000 --prevalence 0.08 --seed 1
	$(BIN)/lesionflow run quick --data $(DEMO)/data --out $(DEMO)/run --processes 2 --keep-serving
	$(BIN)/lesionflow ask $(DEMO)/run $(DEMO)/data/test-image.hdf5; asked=$$?; \
	$(BIN)/lesionflow undeploy $(DEMO)/run; exit $$asked
	$(BIN)/lesionflow show $(DEMO)/run

test: install lint browser  ## lint, types and the tests (under 20 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

browser: install  ## Chromium (apt) and axe-core (npm) for the tests of pages, as root; else says what to install
	$(BIN)/python tests/browser/fetch.py

test-slow: install  ## the proofs that take longer
	$(BIN)/python -m pytest -m slow

faults: install  ## 300 faults planted in trainings of two processes (SEED=1; about an hour and a half on 2 cores)
	$(BIN)/python tests/training/faults.py --count 300 --seed $(or $(SEED),1)

hostile: install  ## 100,000 hostile requests at a service of BUNDLE (the demo's, unless named)
	$(BIN)/python tests/serving/hostile.py $(or $(BUNDLE),$(DEMO)/run/bundle) --count 100000

lint: install  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## every benchmark: both sides in one run
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit; done

docs: install  ## write again what is generated: manifests, the settings' and the features' tables, the pipeline's picture
	$(BIN)/python deploy/render.py
	$(BIN)/python docs/write_settings.py
	$(BIN)/python docs/write_features.py
	$(BIN)/python docs/draw_pipeline.py

clean:  ## remove what the tasks made (not .venv)
	rm -rf $(DEMO) build .pytest_cache .mypy_cache .ruff_cache

lock:  ## pin what .venv holds (CUDA's packages follow torch's own pins)
	$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia-|cuda-|triton=|pip=|setuptools)' > requirements.txt

$(AUDIT)/.installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet "cyclonedx-bom>=7" "pip-audit>=2.9"
	touch $@

sbom: install $(AUDIT)/.installed  ## build/sbom.json: every package that .venv holds, with licences (CycloneDX)
	mkdir -p build
	$(AUDIT)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/sbom.json

audit: $(AUDIT)/.installed  ## known weaknesses of what is pinned; fails too where a package can't be looked up
	$(AUDIT)/bin/pip-audit --requirement requirements.txt --no-deps --disable-pip --strict --progress-spinner off
