"""A tiny base and rows for short runs."""

import pytest
from workspace import Workspace, make_workspace


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("tracing")
    return make_workspace(folder)
