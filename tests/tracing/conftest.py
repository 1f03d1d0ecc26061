"""A tiny base and rows for short runs."""

import sys
from pathlib import Path

import helpers
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "commands"))

from workspace import CHATS, PAIRS, Workspace  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("tracing")
    helpers.write_tiny_base(folder / "tiny")
    sft_rows = helpers.write_jsonl(folder / "chats.jsonl", CHATS)
    return Workspace(folder, folder / "tiny", sft_rows, helpers.write_jsonl(folder / "pairs.jsonl", PAIRS))
