# make demo    encode and decode a CT, generate another one, draw both (CT=path: use your own CT)
# make test    check a change before it is accepted: format, lint, types, tests
# make e2e     tests that need Debian packages (Orthanc, nginx, systemd, Chromium, npm) or minutes; run as root
# make page    fetch NiiVue and Swagger UI, at fixed versions, for the page of fvae serve (needs npm)
# make docs    build the documentation as a site in build/site; warnings are errors
# make sbom    list all dependencies with their licences, as a table and as CycloneDX, in build/sbom
# make dist    build the sdist and the wheel in dist/, with the files of make page in both
# make bench   measure throughput and peak memory of every engine that runs here
# make clean   remove .venv, demo/, dist/ and caches
#
# Needs make, and Python 3.11 or later with venv. Everything is installed into .venv.

SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

# One fixed version, so that everyone tests the same. Installed first: the version ranges of the
# other packages then accept it.
TORCH ?= torch==2.13.0

# Voxels of the demo's phantom: large enough to show structure, small enough for half a minute.
SHAPE ?= 256,256,160
# What the generated CT of the demo should show.
FINDINGS ?= nodule in the right lung
export CT SHAPE FINDINGS

.PHONY: demo test check e2e docs page sbom dist bench clean

# Old results are removed by name: a file of yours in demo/ stays.
demo: .venv/installed-base
	@mkdir -p demo
	@cd demo && rm -rf latents.zarr recon.nii.gz encode.json decode.json errors.png errors.json \
		generated.nii.gz generate.json generated.png
	@set -e; \
	if [ -n "$$CT" ]; then \
		ct=$$CT; labels=; \
	else \
		ct=demo/ct.nii.gz; labels=demo/organs.nii.gz; \
		rm -f "$$ct" "$$labels"; \
		echo "== drawing a synthetic torso of $$SHAPE voxels"; \
		$(BIN)/fvae phantom -o "$$ct" --shape "$$SHAPE" --labels "$$labels"; \
	fi; \
	echo "== encoding $$ct to latents"; \
	$(BIN)/fvae encode "$$ct" -o demo/latents.zarr --json demo/encode.json; \
	echo "== decoding the latents to a CT"; \
	$(BIN)/fvae decode demo/latents.zarr -o demo/recon.nii.gz --json demo/decode.json; \
	echo "== comparing the decoded CT with the original"; \
	$(BIN)/fvae compare "$$ct" demo/recon.nii.gz $${labels:+--labels "$$labels"} \
		--png demo/errors.png --json demo/errors.json; \
	if [ -n "$$labels" ]; then \
		echo "== generating a CT from the organ mask of the torso, with the findings: $$FINDINGS"; \
		$(BIN)/fvae generate --mask "$$labels" --findings "$$FINDINGS" \
			-o demo/generated.nii.gz --json demo/generate.json; \
		echo "== drawing the generated CT beside the torso whose mask it was made from"; \
		$(BIN)/fvae compare "$$ct" demo/generated.nii.gz --png demo/generated.png \
			--names "Torso,Generated" --no-ssim -q; \
	fi; \
	echo "== done: open demo/errors.png$${labels:+ and demo/generated.png}; the numbers are in demo/*.json"

test: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

check: test

# Only missing packages are installed. Any npm will do, so Debian's is added only if there is none.
DEBIAN := chromium dicom3tools docker-compose nginx orthanc orthanc-dicomweb prometheus systemd $(shell command -v npm >/dev/null || echo npm)
e2e: .venv/installed-dev
	@missing=$$(for p in $(DEBIAN); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "== installing" $$missing; \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; \
	fi
	@$(MAKE) --no-print-directory page
	$(BIN)/pytest -m e2e -n 2 --dist worksteal

docs: .venv/installed-dev
	$(BIN)/mkdocs build -q --strict

sbom: .venv/installed-dev
	$(BIN)/python tools/sbom.py -o build/sbom

page: fvae_deploy/server/page/vendor/niivue.umd.js

fvae_deploy/server/page/vendor/niivue.umd.js: tools/fetch_vendor.py
	$(PYTHON) tools/fetch_vendor.py

# The wheel is built from the sdist, so files left in build/ do not get into it. Both are the same
# bytes for the same commit.
dist: page | .venv/bin/python
	@$(PIP) 'build>=1.2'
	$(BIN)/python tools/build_dist.py -o dist

bench: .venv/installed-dev
	$(BIN)/fvae bench --peer tools/train_tiny/tiny.safetensors

clean: # build/ stays, since it may hold trained weights
	rm -rf .venv demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# Marker files record what is installed; pip runs again only after pyproject.toml or this file
# changed. The install is editable, so changed code needs no new install.

.venv/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo "needs Python 3.11 or later: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@echo "== making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

.venv/installed-base: pyproject.toml Makefile | .venv/bin/python
	@echo "== installing fvae"
	@$(PIP) -e .
	@touch $@

.venv/installed-dev: pyproject.toml Makefile | .venv/bin/python
	@echo "== installing $(TORCH)"
	@$(PIP) '$(TORCH)'
	@echo "== installing fvae, all engines and the tools for checks"
	@$(PIP) -e '.[cpu,dev]'
	@touch .venv/installed-base $@
