#!/usr/bin/env bash
# Everything on a fresh machine: make .venv, install with the dev extra, lint, type-check, run all tests.
set -euo pipefail
. "$(dirname "$0")/setup.sh" "[dev]"
ruff check lowlevel tests benchmarks
ruff format --check lowlevel tests benchmarks
mypy
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # each test takes one thread, and shares what its file made
