"""The model of these tests."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from small import small_model  # noqa: E402


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))
