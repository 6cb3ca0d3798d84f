# The front door. `make serve` and `make test` set up all that they need; every target is safe to run again.
PYTHON ?= python3
CONFIG ?= configs/train.yaml
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
MINUTES ?= 60
DEMO := configs/train-demo.yaml
export TLS_CERT ?= tls/server.pem
STAGES := prepare tokenizer encode run export

export RAY_USAGE_STATS_ENABLED = 0

.PHONY: help setup setup-dev serve tls certificate monitor test chaos soak clients walkthrough arm check format proto bench peers parts pictures docs train train-demo clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/serving ## Create .venv with what serving needs (no PyTorch)

setup-dev: $(VENV)/development ## Create .venv with everything: training, tests, linters

serve: $(VENV)/serving ## Serve models/stories-8m: four replicas behind gRPC on localhost:9000
	$(BIN)/tinylm serve

monitor: $(VENV)/serving ## Prometheus and, if installed, Grafana on the running service
	$(BIN)/python -m tinylm.serving.ray.monitor

tls: $(VENV)/serving ## TLS on port 9443 in front of the service (TLS_CERT=file.pem: certificate chain and key)
	@test -r '$(TLS_CERT)' || { echo "error: no certificate at $(TLS_CERT): give TLS_CERT=file.pem with chain and key, \
	or make one to try it with: make certificate" >&2; exit 1; }
	@haproxy=$$($(BIN)/python -c 'from tinylm.serving.ray.haproxy import find_binary; print(find_binary())' 2>/dev/null || command -v haproxy) \
	|| { echo "error: HAProxy is not installed: Ray brings it only for Linux" >&2; exit 1; }; exec "$$haproxy" -W -db -f configs/haproxy.cfg

# Refuses to replace a certificate or a key. `set -C` makes the shell refuse too, if a file appears meanwhile.
certificate: ## Make a self-signed certificate for localhost, to try TLS with; clients trust ca.pem beside it
	@for file in '$(TLS_CERT)' '$(dir $(TLS_CERT))ca.pem'; do if [ -e "$$file" ] || [ -L "$$file" ]; then \
		echo "error: $$file exists: move it away, or give TLS_CERT=file.pem in another directory" >&2; exit 1; fi; done
	@mkdir -p '$(dir $(TLS_CERT))' && set -C && umask 077 && made=$$(mktemp -d) && trap 'rm -r "$$made"' EXIT && \
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj /CN=localhost \
		-addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1 -keyout "$$made/key" -out "$$made/ca" 2>/dev/null && \
	cat "$$made/ca" "$$made/key" > '$(TLS_CERT)' && umask 022 && cat "$$made/ca" > '$(dir $(TLS_CERT))ca.pem'
	@echo "made $(TLS_CERT) for the server and $(dir $(TLS_CERT))ca.pem for clients"

test: $(VENV)/development ## Run every test but the slow ones of `make chaos`, `clients`, `walkthrough` and `arm`
	$(BIN)/python -m pytest

chaos: $(VENV)/development ## Kill parts of the service under load, for minutes
	CHAOS_REPORT=docs/results/chaos.json $(BIN)/python -m pytest -m chaos
	$(BIN)/python -m loadtest.bench.pages

soak: $(VENV)/serving ## Mixed load on a disturbed service, with its memory (MINUTES=60); writes docs/results/mixed-hour.json
	$(BIN)/python -m loadtest.bench.mixed_hour --minutes $(MINUTES) --out docs/results/mixed-hour.json
	$(BIN)/python -m loadtest.bench.pages

clients: $(VENV)/development ## Install programs of other people below .clients/ and try docs/clients.md with them
	CLIENTS_REPORT=docs/results/clients.json $(BIN)/python -m pytest -m clients tests/docs/test_clients.py
	$(BIN)/python -m loadtest.bench.pages

walkthrough: $(VENV)/development ## Execute the commands of README.md and docs/ in a fresh clone of HEAD, as they stand there
	$(BIN)/python -m pytest -m walkthrough --tb=short --durations=0 tests/docs/test_walkthrough.py

# Debian's Python and the packages that the engine needs, for ARM. They are unpacked here, not installed.
ARM := .arm
ARM_PACKAGES := numpy numba filelock sentencepiece threadpoolctl safetensors pydantic
ARM_PLATFORMS := $(foreach version,2_28 2_27 2_26 2_17,--platform manylinux_$(version)_aarch64) --platform manylinux2014_aarch64

arm: $(VENV)/development ## Run the engine's code for ARM in an emulator and compare it with this processor's, for half an hour or more
	@for program in qemu-aarch64 mmdebstrap; do command -v $$program >/dev/null || { \
		echo "error: $$program is not installed: sudo apt-get install qemu-user mmdebstrap" >&2; exit 1; }; done
	@$(MAKE) --no-print-directory $(ARM)/ready
	ARM_ROOT=$(ARM) $(BIN)/python -m pytest -m arm tests/tinylm/kernels/test_arm.py

$(ARM)/ready: constraints.txt
	rm -rf $(ARM)
	mkdir -p $(ARM)/root
	mmdebstrap --quiet --variant=extract --arch=arm64 --include=python3,libstdc++6,libssl3 bookworm - \
		| tar --extract --directory $(ARM)/root --exclude './dev/*'
	$(PIP) --quiet --target $(ARM)/packages --python-version 3.11 --only-binary=:all: $(ARM_PLATFORMS) $(ARM_PACKAGES)
	touch $@

check: $(VENV)/development ## Check style, formatting, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/development ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/development ## Generate tinylm/v1 from protos/
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. tinylm/v1/tinylm.proto

bench: $(VENV)/bench ## Measure the standard set of services (ONLY=haproxy,bare) into docs/results/standard/ and docs/speed.md
	$(BIN)/python -m loadtest.bench.standard $(if $(ONLY),--only $(ONLY))
	$(BIN)/python -m loadtest.bench.pages

peers: $(VENV)/peers ## Compare the engine with five others, such as llama.cpp; writes docs/results/peers.json
	$(BIN)/python -m loadtest.bench.peers --out docs/results/peers.json --plot docs/images/peers.png
	$(BIN)/python -m loadtest.bench.pages

parts: $(VENV)/serving ## Where the time of a decode step goes; writes docs/results/parts.json
	$(BIN)/python -m loadtest.bench.parts --out docs/results/parts.json
	$(BIN)/python -m loadtest.bench.pages

pictures: $(VENV)/development ## Measure, draw and write docs/how-it-works.md again
	$(BIN)/python -m docs.making.measure
	$(BIN)/python -m docs.making.pictures
	$(BIN)/python -m docs.making.page

docs: $(VENV)/development ## Build the documentation as a site in site/, with every link checked
	@$(SITE_IS_OURS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file configs/mkdocs.yml
	@echo "wrote site/index.html"

train: $(VENV)/development ## Prepare, tokenize, encode, train, evaluate and export (CONFIG=configs/train.yaml)
	$(foreach stage,$(STAGES),$(BIN)/python -m train.$(stage) --config $(CONFIG) &&) true

train-demo: $(VENV)/development ## The same in two minutes, on text that it makes itself
	$(BIN)/python -m train.demo_text
	$(MAKE) train CONFIG=$(DEMO)

clean: ## Remove .venv, site/ and caches that these targets made, never data or models
	@$(VENV_IS_OURS)
	@$(SITE_IS_OURS)
	rm -rf $(VENV) .clients $(ARM) site tinylm.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# What `venv --clear` may empty and `make clean` may remove: a virtual environment, or nothing yet.
VENV_IS_OURS = if [ -e $(VENV) ] && [ ! -e $(VENV)/pyvenv.cfg ] && [ -n "$$(ls -A $(VENV))" ]; then \
	echo "error: $(VENV) is not a virtual environment: move it away" >&2; exit 1; fi
# What `make docs` may empty and `make clean` may remove: a site of TinyLM, or nothing yet.
SITE_IS_OURS = if [ -e site ] && ! grep -qs 'content="mkdocs-' site/index.html; then \
	echo "error: site was not built by make docs: move it away" >&2; exit 1; fi

$(VENV)/bin/python:
	@$(VENV_IS_OURS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("TinyLM needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/serving: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[serve]'
	touch $@

$(VENV)/development: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[serve,train,export,bench,test,dev,docs]'
	touch $@ $(VENV)/serving

$(VENV)/bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[serve,bench]'
	touch $@ $(VENV)/serving

# Without AMX: llama.cpp's kernels for it end the process with this model.
LLAMA_FLAGS = -march=native $(if $(shell grep -m 1 -w amx_tile /proc/cpuinfo 2>/dev/null),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
$(VENV)/peers: pyproject.toml constraints.txt | $(VENV)/bin/python
	CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release '-DCMAKE_C_FLAGS=$(LLAMA_FLAGS)' '-DCMAKE_CXX_FLAGS=$(LLAMA_FLAGS)' -DLLAVA_BUILD=OFF" \
		$(PIP) --no-binary llama-cpp-python --editable '.[serve,bench,peers]'
	touch $@
