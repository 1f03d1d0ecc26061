"""The tiny base of these tests, and one thread: bit-for-bit comparisons need the same number on both sides."""

from pathlib import Path

import helpers
import pytest
import torch


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    helpers.write_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def parent_adapter(tiny_base, tmp_path_factory) -> Path:
    return helpers.save_random_adapter(tiny_base, tmp_path_factory.mktemp("parent") / "adapter")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
