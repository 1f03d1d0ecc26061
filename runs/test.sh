#!/usr/bin/env bash
# Everything on a fresh machine: make .venv, install with the dev extra, lint, type-check, run the tests.
# Arguments go to pytest: `bash runs/test.sh -m ""` also runs the slow tests, and loops over faults in full, as CI does.
set -euo pipefail
. "$(dirname "$0")/setup.sh" "[dev]"
ruff check lowlevel tests benchmarks
ruff format --check lowlevel tests benchmarks
mypy
export OMP_NUM_THREADS=1  # tests take turns on two cores, each in one thread
export FUZZ_EXAMPLES="${FUZZ_EXAMPLES:-20}"
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" "$@"  # a file's tests share what it made
