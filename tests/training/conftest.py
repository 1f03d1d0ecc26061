"""The tiny base of these tests, and one thread: bit-for-bit comparisons need the same number on both sides."""

from pathlib import Path

import helpers
import pytest


@pytest.fixture(scope="session")
def parent_adapter(tiny_base, tmp_path_factory) -> Path:
    return helpers.save_random_adapter(tiny_base, tmp_path_factory.mktemp("parent") / "adapter")
