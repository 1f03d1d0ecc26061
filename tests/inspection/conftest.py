"""A tiny base, one thread, and runs whose every step is logged and saved."""

import sys
from pathlib import Path

import helpers
import pytest
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "commands")]

from samples import Runs, hostile_pieces, make_runs  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    helpers.write_tiny_base(folder)
    return folder


@pytest.fixture
def policy(tiny_base):
    """An adapter with an effect, and dropout that would show."""
    return helpers.make_policy(tiny_base, dropout=0.3)


@pytest.fixture(scope="session")
def pieces():
    return hostile_pieces()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"))
