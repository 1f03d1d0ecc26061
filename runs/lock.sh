#!/usr/bin/env bash
# Make runs/lock.txt and runs/lock-dev.txt anew from pyproject.toml: exact versions with hashes, for Linux and Python
# 3.11 or newer. Needs uv (pip install uv). To move single packages: bash runs/lock.sh --upgrade-package NAME; all: --upgrade.
# Not in the locks: torch, whose right build depends on the machine, and what that build itself needs (CUDA, Triton);
# runs/setup.sh pins its version.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^TORCH=//p' runs/setup.sh)
left_out=(torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-{cublas,cuda-cupti,cuda-nvrtc,cuda-runtime}
    nvidia-{cudnn-cu13,cufft,cufile,curand,cusolver,cusparse,cusparselt-cu13,nccl-cu13,nvjitlink,nvshmem-cu13,nvtx})
options=(--universal --generate-hashes --python-version 3.11 --no-annotate --quiet)
options+=(--custom-compile-command "bash runs/lock.sh" "${left_out[@]/#/--no-emit-package=}")
lock() { uv pip compile pyproject.toml "${options[@]}" -c - "$@" <<<"torch==$version"; }
lock -o runs/lock.txt "$@"
lock --extra dev -o runs/lock-dev.txt "$@"
# The environment that pyproject.toml declares for uv, which it repeats in every line.
sed -i "s/ ; python_full_version < '3.15' and sys_platform == 'linux' / /" runs/lock.txt runs/lock-dev.txt
