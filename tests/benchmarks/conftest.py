"""The benchmarks are run from the repository's root and are no installed package; one small workload for all tests."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    """A folder that holds what step.py would make first."""
    from benchmarks.workload import make_workload

    folder = tmp_path_factory.mktemp("benchmarks")
    make_workload(folder / "workload", "tiny", 64, 192)
    return folder
