# `make help` lists the targets. Nothing here but `make lab` needs root; `make test` says which system packages it wants.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

# Debian puts mosquitto into /usr/sbin.
export PATH := $(PATH):/usr/sbin
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help setup run demo check test bench bench-peers lab fuzz clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

setup: $(VENV)/.setup-all ## Make .venv with everything that tests and checks need

run: $(VENV)/.setup ## Start the server; ARGS="--host 0.0.0.0 …" are its flags
	$(BIN)/holdfast serve $(ARGS)

demo: $(VENV)/.setup ## Show a server, devices and pushes at work
	$(BIN)/python -m clients.demo $(ARGS)

check: $(VENV)/.setup-all ## Formatting, lint, types, import arrows: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

test: $(VENV)/.setup-all $(VENV)/.setup-node ## All tests; ARGS="-k name" chooses
	@for tool in mosquitto:mosquitto mosquitto_sub:mosquitto-clients promtool:prometheus curl:curl node:nodejs npm:npm \
	    chromium:chromium redis-server:redis-server haproxy:haproxy; do \
	    command -v $${tool%%:*} >/dev/null || \
	    echo "$${tool%%:*} is missing; its tests are skipped. As root: apt-get install $${tool##*:}"; \
	done
	$(BIN)/pytest -n auto --dist loadgroup $(ARGS)

bench: $(VENV)/.setup-all ## Measure; ARGS=--write puts the tables into docs/numbers.md, ARGS=--quick is a trial
	$(BIN)/python -m loadtest.bench $(ARGS)

bench-peers: $(VENV)/.setup-all $(VENV)/.setup-node ## Measure beside other MQTT servers; ARGS="--peers mosquitto,amqtt", ARGS=--quick
	$(BIN)/python -m loadtest.peers $(ARGS)

lab: $(VENV)/.setup-all ## Pushes through lossy networks, beside other clients and brokers (root, 65 minutes); ARGS="--list"
	$(BIN)/python -m loadtest.lab $(ARGS)

fuzz: $(VENV)/.setup-all ## The property tests with many more EXAMPLES, then each fuzz target for SECONDS
	EXAMPLES=$(EXAMPLES) $(BIN)/python -c "$$FUZZ" -m hypothesis \
	    -W ignore::pytest.PytestAssertRewriteWarning $(ARGS)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	nice -n 19 $(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS)

clean: ## Remove what make made; holdfast-data stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .bench .fuzz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

EXAMPLES ?= 20000
SECONDS ?= 300

define FUZZ
import os, sys, hypothesis, pytest
examples = int(os.environ["EXAMPLES"])
hypothesis.settings.register_profile("fuzz", max_examples=examples, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fuzz")
sys.exit(pytest.main(sys.argv[1:]))
endef
export FUZZ

# A stamp is newer than pyproject.toml while the environment has what it asks for.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is too old: Holdfast needs Python 3.11 or newer; name one with PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make a venv. As root: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.setup-all: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,check]'
	@touch $@ $(VENV)/.setup

# MQTT.js and the vendor's SDKs for Node, for tests, and a server to be measured beside: no part of Holdfast. Without npm those tests are skipped.
# The newest jpush-async (4.2.0) drops query strings and works with no server.
NODE_PACKAGES := mqtt@5 jpush-sdk@3.5.0 jpush-async@4.1.0 aedes@1

$(VENV)/.setup-node: Makefile | $(BIN)/python
	@if command -v npm >/dev/null; then \
	    npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(VENV)/node $(NODE_PACKAGES) && touch $@ || \
	    echo "the packages for Node could not be installed; their tests are skipped"; \
	fi
