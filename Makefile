# `make quickstart` and `make test` work as the first command on a fresh machine with Python 3.11 or 3.12 (with headers), git and g++.
# The environment is made once, in .venv, and again only when pyproject.toml changes. PYTHON=... picks the interpreter.

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export PYTHON

# One thread each: on small models more threads are slower, and the shared engine has threads of its own. No network in tests.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false VLLM_CPU_OMP_THREADS_BIND=nobind \
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1 DS_ACCELERATOR=cpu

.PHONY: help quickstart test test-all lint install
help:
	@echo "make quickstart   environment, warm start, RL, evaluation before and after: about 6 minutes after the installation"
	@echo "make test         environment, lint, types, tests"
	@echo "make test-all     the same with the proofs that take minutes"
	@echo "make lint         format, lint and types only"

quickstart: $(STAMP)
	@$(RUN) -m training experiment=quickstart

lint: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy training rollout serving hydra_plugins benchmarks

# Two workers, as most tests wait for an engine. A file's tests stay together and files in order: they share servers.
test: lint
	@$(TEST_ENV) $(RUN) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: lint
	@$(TEST_ENV) $(RUN) -m pytest

install: $(STAMP)

# The stamp is written last: a half-finished installation leaves none and is taken up again.
$(STAMP): pyproject.toml .ci/install.sh
	@rm -f $@
	@./.ci/install.sh $(VENV)
	@touch $@
