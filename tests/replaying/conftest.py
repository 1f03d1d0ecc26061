"""Runs of 14 steps, dropout on, packed, a checkpoint every 5 steps."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import helpers
import pytest

sys.path.append(str(Path(__file__).parent))

from workspace import Workspace, make_workspace, run, stop_at  # noqa: E402

STEPS = 14  # the third epoch begins with step 13


@dataclass(frozen=True)
class Runs:
    """Run folders by name."""

    space: Workspace
    folder: Path

    def copy(self, name: str, to: Path) -> Path:
        return Path(shutil.copytree(self.folder / name, to / name))


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("replayed")
    space = make_workspace(folder)
    parent = helpers.save_random_adapter(space.base, folder / "parent-adapter")
    train = {"max_steps": STEPS, "save_steps": 5, "save_total_limit": 9, "logging_steps": 1, "warmup_steps": 3}
    data = {"packing": True, "max_length": 96}
    stand = {"model": {"adapter": str(parent)}, "dpo": {"disable_dropout": False}}

    def make(name: str, method: str, **sections: dict) -> None:
        sections = {**(stand if method == "dpo" else {}), **sections}
        given = {"train": {**train, **sections.pop("train", {})}, "data": {**data, **sections.pop("data", {})}}
        said = run(method, space.write(name, method, **given, **sections))
        assert said.code in (0, 143), said.err

    make("sft", "sft", train={"optim": "paged_adamw_32bit"})
    make("dpo", "dpo", train={"optim": "paged_adamw_32bit"})
    make("dpo8", "dpo", train={"optim": "paged_adamw_8bit"}, lora={"r": 16})
    cache = {"disable_dropout": False, "reference_cache": str(folder / "cache")}
    make("cached", "dpo", dpo=cache)
    make("thirds", "sft", train={"logging_steps": 3, "max_steps": 12})
    held_out = {"eval_source": "holdout", "eval_limit": 4}
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 8)
        make("stopped", "dpo", train={"eval_steps": 4, "max_steps": 15}, data=held_out)
    said = run("dpo", folder / "stopped.toml", "--resume")
    assert said.code == 0, said.err
    return Runs(space, folder)
