"""Subjects on the tiny base: a step of SFT, and one of DPO on a frozen adapter with a smoothed loss."""

import sys
from pathlib import Path

import helpers
import pytest

sys.path.append(str(Path(__file__).parent))

from workspace import Workspace, make_workspace  # noqa: E402

from lowlevel.config.file import load_config  # noqa: E402
from lowlevel.running.reopening import step_examples  # noqa: E402
from lowlevel.verification.opening import make_subject, open_start  # noqa: E402


@pytest.fixture(scope="session")
def space(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("verification")
    space = make_workspace(folder)
    helpers.save_random_adapter(folder / "tiny", folder / "parent")
    return space


@pytest.fixture(scope="session")
def make(space):
    """A subject from a run file; `examples`: as many of the step's."""

    def subject(method, examples=4, exact=1_000_000, **sections):
        name = f"{method}-{len(list(space.folder.glob('*.toml')))}"
        opened = open_start(load_config(space.write(name, method, **sections)), space.folder)
        rows = step_examples(opened.config, opened.inputs.data, 1)[:examples]
        return make_subject(opened, rows, 0, exact)

    return subject


@pytest.fixture(scope="session")
def sft(make):
    return make("sft")


@pytest.fixture(scope="session")
def dpo(make, space):
    sections = {
        "model": {"adapter": str(space.folder / "parent")},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3},
    }
    return make("dpo", dpo={"loss_type": "cdpo", "label_smoothing": 0.1}, **sections)
