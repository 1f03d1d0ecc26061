#!/usr/bin/env bash
# For a machine with a T4: install beside its torch, check it, and measure what runs/README.md predicts.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nvidia-smi -L >/dev/null 2>&1 || { echo "runs/t4.sh measures an NVIDIA GPU, and nvidia-smi finds none here" >&2; exit 1; }
mkdir -p out/t4
{
    python3 -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >out/t4/torch.txt &&
        python3 -m pip install --quiet --constraint out/t4/torch.txt . &&
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv &&
        python3 -m lowlevel doctor --out out/t4 &&
        git log -1 --format='commit %h of %cs' &&
        python3 -m benchmarks.t4 --out out/t4
    echo "ended with exit code $?"
} 2>&1 | tee out/t4/report.txt
