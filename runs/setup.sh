# Sourced by demo.sh and test.sh: make .venv and install the package, with $1 as the extra ("" or "[dev]").
# PyTorch's default Linux build brings gigabytes of CUDA, so a machine without a GPU gets the CPU build of PyPI's index first.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
python -c 'import sys; sys.exit("lowlevel needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
if ! python -c 'import torch' 2>/dev/null; then
    python -m pip install --quiet --upgrade pip
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        python -m pip install --quiet 'torch>=2.11,<2.15'
    else
        python -m pip install --quiet torch==2.13.0
    fi
fi
python -m pip install --quiet -e ".$1"
