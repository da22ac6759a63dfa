# Two commands matter: `make train` and `make test`. `make` alone lists the rest.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-full peers bench build simt lint types format wheel clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
ARGS ?=

# One folder of objects for every build in .venv, so that a changed source recompiles what depends on it and no more.
export PPO_FAST_BUILD_DIR := build/venv

CPP := $(shell find csrc tests/simt -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cc')

help:
	@echo 'make train   install into .venv and train PPO on CartPole until it is solved    ARGS="--seed 2"'
	@echo 'make test    install into .venv and run every check: style, types, tests        ARGS="-k gae"'
	@echo 'make test-full   also what takes minutes each: learning to a goal, clusters of processes'
	@echo 'make peers   other trainers'\'' own tests, without and with ppo_fast                 ARGS="sb3 verl"'
	@echo 'make bench   measure every op and the trainer against their peers               ARGS="--help"'
	@echo 'make gpu     on a machine with an NVIDIA GPU and a torch of its own, offline: build, test, sanitize, measure'
	@echo 'make build   compile what changed; an editable install then runs it'
	@echo 'make lint    ruff, clang-format, mypy'
	@echo 'make format  rewrite the sources in the style that lint asks for'
	@echo 'make wheel   a wheel and a source archive in dist/'
	@echo 'make clean   remove .venv and everything built; runs/ stays'
	@echo 'Variables:   PYTHON=python3.12 (makes .venv; runs make gpu), TEST_JOBS=4 (test processes)'
	@echo '             PARTS="build test sanitize bench" (of make gpu)'

train: build
	$(BIN)/ppo-fast train control --env-id CartPole-v1 --run-dir runs/CartPole-v1 $(ARGS)

# What lint finds does not keep the tests from running; their summary comes last. Two threads a process, which sleep
# when they wait. Tests that share an expensive fixture name a group and stay together.
test: build simt
	@failed=0; \
	$(MAKE) --no-print-directory lint || { failed=1; echo 'lint FAILED (above); the tests run all the same'; }; \
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE \
		$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadgroup $(ARGS) || failed=1; \
	exit $$failed

test-full:
	@$(MAKE) --no-print-directory test ARGS="-m 'slow or not slow' $(ARGS)"

# Installs pinned trainers into build/peers and takes their tests from source archives and repositories.
peers: build
	$(BIN)/python -m tests.peers $(ARGS)

bench: build
	$(BIN)/ppo-fast bench $(ARGS)

# No .venv: PYTHON's own torch, no network. PARTS="test" runs one part; bench/gpu.sh says what else can be set.
gpu:
	@PYTHON='$(PYTHON)' PARTS='$(PARTS)' ARGS='$(ARGS)' bench/gpu.sh

build: $(VENV)/built

# The CUDA kernels as C++, for tests/test_simt.py: run as fibers on the CPU, with every access checked.
simt: build
	@[ "$$(uname)" != Linux ] || $(BIN)/cmake --build $(PPO_FAST_BUILD_DIR) --target simt -- --quiet

lint: $(VENV)/installed
	@failed=0; \
	echo ruff check; $(BIN)/ruff check . || failed=1; \
	echo ruff format; $(BIN)/ruff format --check . || failed=1; \
	echo clang-format; $(BIN)/clang-format --dry-run -Werror $(CPP) || failed=1; \
	echo mypy; $(BIN)/mypy || failed=1; \
	exit $$failed

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: $(VENV)/installed
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find ppo_fast bench tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f ppo_fast/*.so

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("ppo_fast needs Python 3.10 or newer, got " + sys.version.split()[0] + "; choose another one with make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'No venv: install the package that has it (Debian and Ubuntu: python3-venv).' >&2; exit 1; }

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt setup.py
	$(BIN)/python -m pip install -q 'pip>=21.3'
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel cmake ninja pybind11 apache-tvm-ffi
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/built: $(VENV)/installed CMakeLists.txt setup.py $(CPP)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
