# make demo    reconstruct a CT and draw the errors (CT=path for one's own; else a synthetic torso)
# make test    everything that is checked before a change is taken: format, lint, types, tests
# make e2e     what needs more than pip: Orthanc, Chromium and npm from Debian; minutes long; as root
# make page    bring NiiVue and Swagger UI, pinned, for the page of fvae serve (needs npm)
# make bench   throughput and peak memory of every engine that runs here
# make clean   remove .venv, demo/ and caches
#
# Needs Python 3.11 or later with venv, and make. Everything is installed into .venv.

SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

# Pinned, so that everyone tests the same. Installed before the rest, whose ranges it then meets.
TORCH ?= torch==2.13.0

# The demo's phantom: large enough to show structure, small enough to be done in half a minute.
SHAPE ?= 256,256,160
export CT SHAPE

.PHONY: demo test check e2e page bench clean

demo: .venv/installed-cpu
	@mkdir -p demo
	@if [ -n "$$CT" ]; then \
		set -e; \
		echo "== reconstructing $$CT"; \
		$(BIN)/fvae reconstruct "$$CT" -o demo/recon.nii.gz --run-report demo/run.json; \
		echo "== comparing"; \
		$(BIN)/fvae compare "$$CT" demo/recon.nii.gz --png demo/errors.png --json demo/errors.json; \
	else \
		set -e; \
		echo "== drawing a synthetic torso of $$SHAPE voxels"; \
		$(BIN)/fvae phantom -o demo/ct.nii.gz --shape "$$SHAPE" --labels demo/organs.nii.gz; \
		echo "== reconstructing it"; \
		$(BIN)/fvae reconstruct demo/ct.nii.gz -o demo/recon.nii.gz --run-report demo/run.json; \
		echo "== comparing, organ by organ"; \
		$(BIN)/fvae compare demo/ct.nii.gz demo/recon.nii.gz --labels demo/organs.nii.gz \
			--png demo/errors.png --json demo/errors.json; \
	fi
	@echo "== done: open demo/errors.png; the numbers are in demo/errors.json and demo/run.json"

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

check: test

# Installed only where they are not there yet; npm may have come another way.
DEBIAN := chromium dicom3tools orthanc orthanc-dicomweb $(shell command -v npm >/dev/null || echo npm)
e2e: .venv/installed-dev
	@missing=$$(for p in $(DEBIAN); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "== installing" $$missing; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; \
	fi
	@$(MAKE) --no-print-directory page
	$(BIN)/pytest -m e2e

page: fvae_deploy/server/page/vendor/niivue.umd.js

fvae_deploy/server/page/vendor/niivue.umd.js: tools/fetch_vendor.py
	$(PYTHON) tools/fetch_vendor.py

bench: .venv/installed-dev
	$(BIN)/fvae bench --peer tools/train_tiny/tiny.safetensors

clean: # build/ stays: trained weights may lie there
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# Stamps: installed again only when pyproject.toml or this file changed. Editable, so that code
# never is stale.

.venv/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo "needs Python 3.11 or later: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@echo "== making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

.venv/installed-cpu: pyproject.toml Makefile | .venv/bin/python
	@echo "== installing fvae and the CPU engines"
	@$(PIP) -e '.[cpu]'
	@touch $@

.venv/installed-dev: pyproject.toml Makefile | .venv/bin/python
	@echo "== installing $(TORCH)"
	@$(PIP) '$(TORCH)'
	@echo "== installing fvae, the engines and the checks"
	@$(PIP) -e '.[cpu,dev]'
	@touch .venv/installed-cpu $@
