"""The runs that faults are tried on. The machinery is that of `python -m benchmarks.faults`, which tries many more."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    from benchmarks.faulting.stage import Stage

    return Stage(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session", params=["sft", "dpo"])
def play(stage, request):
    """A run of 4 steps of each kind."""
    from benchmarks.faulting.stage import Case

    return stage.play(Case(request.param))


@pytest.fixture(scope="session")
def sft(stage):
    from benchmarks.faulting.stage import Case

    return stage.play(Case("sft"))
