# Sourced by demo.sh and test.sh: make .venv and install the package, with $1 as the extra ("" or "[dev]").
# torch first: which build is right depends on the machine. PyTorch's default Linux build brings gigabytes of CUDA, so a
# machine without a GPU gets the CPU build where PyPI's index has one. Everything else is in the lock, with hashes.
TORCH=2.13.0
TRITON=3.7.1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
python -c 'import sys; sys.exit("lowlevel needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
python -c 'import torch' 2>/dev/null || python -m pip install --quiet "torch==$TORCH"
lock=runs/lock.txt
if [ -n "$1" ]; then
    lock=runs/lock-dev.txt
    # The tests compile every kernel for a T4, on machines without a GPU too. CUDA builds of torch bring this version.
    python -c 'import triton' 2>/dev/null || python -m pip install --quiet "triton==$TRITON"
fi
python -m pip install --quiet --require-hashes --no-deps -r "$lock"
python -m pip install --quiet --no-deps --no-build-isolation -e .
