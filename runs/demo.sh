#!/usr/bin/env bash
# Everything on a fresh machine: make .venv, install, run the built-in demo (SFT, DPO, comparison; CPU or GPU, no download of weights).
set -euo pipefail
. "$(dirname "$0")/setup.sh" ""
lowlevel demo "${@:---restart}"
