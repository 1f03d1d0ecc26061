"""A workspace for tests of whole runs."""

import pytest
from workspace import Workspace, make_workspace


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("kernels"))
