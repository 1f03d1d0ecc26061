"""A workspace for tests of whole runs."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from workspace import Workspace, make_workspace  # noqa: E402


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("kernels"))
