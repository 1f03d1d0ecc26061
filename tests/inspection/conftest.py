"""A tiny base, one thread, and runs whose every step is logged and saved."""

import sys
from pathlib import Path

import helpers
import pytest

sys.path.append(str(Path(__file__).parent))

from samples import Runs, hostile_pieces, make_runs  # noqa: E402


@pytest.fixture(scope="module")
def policy(tiny_base):
    """An adapter with an effect, and dropout that would show; tests do not change it."""
    return helpers.make_policy(tiny_base, dropout=0.3)


@pytest.fixture(scope="session")
def pieces():
    return hostile_pieces()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"))
