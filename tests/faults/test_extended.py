"""A finished run that goes on, and is killed on its way: no result of before is taken for that of the longer run."""

import json
import random
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.faulting.actions import Kill
from benchmarks.faulting.calls import STEP, AtCall
from benchmarks.faulting.comparison import differences, fingerprint
from benchmarks.faulting.damage import flip
from benchmarks.faulting.operations import AtOperation, Record
from benchmarks.faulting.stage import Case, Play
from lowlevel.errors import ConfigError
from lowlevel.model.adapters import adapter_sha256
from lowlevel.running.adapter_sources import find_adapter
from lowlevel.running.run_folder import RunFolder

LONGER = ("--resume", "--train.max_steps", "7", "--allow-change", "train.max_steps")
RESULT = ("adapter", "stacked", "summary.json", "loss.png")


@dataclass(frozen=True)
class Extended:
    """A run of 4 steps, a checkpoint every second of which one is kept, and what is done to its copies."""

    play: Play

    def copy(self) -> Path:
        return self.play.copy(self.play.whole.folder)

    def killed_in(self, step: int) -> Path:
        """A copy, killed in step `step` of going on."""
        folder = self.copy()
        assert self.play.run(folder, AtCall(STEP, (step - 4,), Kill()), more=LONGER).code == -9
        return folder


@pytest.fixture(scope="module", params=["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def extended(stage, request) -> Extended:
    return Extended(stage.play(Case(request.param, train=(("save_steps", 2), ("save_total_limit", 1)))))


def content(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def newest(folder: Path) -> Path | None:
    return RunFolder(folder).newest_adapter(lambda line: None)


def test_a_result_of_before_is_not_taken_for_the_final_one(extended):
    folder = extended.killed_in(7)
    assert newest(folder) == folder / "step-00000006"
    assert not [name for name in RESULT if (folder / name).exists()]
    with pytest.raises(ConfigError, match="holds no adapter; has that run finished"):
        find_adapter(str(folder), "model.adapter")


def test_at_every_change_before_the_first_checkpoint_the_newest_weights_are_there(extended, thorough):
    whole, record = adapter_sha256(extended.play.whole.folder / "adapter"), Record(extended.copy().parent / "log")
    assert extended.play.run(extended.copy(), record, more=LONGER).code == 0
    changes = record.read()
    begin, end = (changes.index(change) for change in ("unlink summary.json", "mkdir .tmp-step-00000006"))
    assert end - begin > 10
    step = {"sft": 2, "dpo": 5}[extended.play.case.method] if thorough else 8
    for number in range(begin, end + 1, step):
        folder = extended.copy()
        assert extended.play.run(folder, AtOperation(number + 1, Kill()), more=LONGER).code == -9
        found = newest(folder)
        assert found and adapter_sha256(found) == whole, changes[number]


@pytest.mark.parametrize("loss", ["damaged", "gone"])
def test_a_result_that_no_checkpoint_has_is_not_given_up(extended, loss):
    folder = extended.copy()
    last = folder / "step-00000004"
    shutil.copytree(extended.play.stopped_at(3) / "step-00000003", folder / "step-00000003")
    if loss == "damaged":
        flip(last / "adapter_model.safetensors", random.Random(0))
    else:
        shutil.rmtree(last)
        shutil.rmtree(folder / "step-00000003")
    before = content(folder)
    ended = extended.play.run(folder)
    assert ended.code == 2 and ended.err.startswith(
        f"error: {folder / 'adapter'} holds a result that is in no usable check"
    )
    assert content(folder) == before
    shutil.move(folder / "adapter", folder.parent / "mine")
    assert extended.play.resumed(folder) == []


def test_the_same_command_goes_on_after_a_kill_at_every_change(extended, thorough):
    """Before the first checkpoint the folder says 7 steps and the checkpoint 4; after it, nothing differs any more."""
    record, whole = Record(extended.copy().parent / "log"), extended.copy()
    assert extended.play.run(whole, record, more=LONGER).code == 0
    changes, expected = record.read(), fingerprint(whole)
    commits = [n for n, change in enumerate(changes, 1) if change == "rename .tmp-step-00000006 step-00000006"]
    step = {"sft": 4, "dpo": 9}[extended.play.case.method] if thorough else 20
    for number in [*range(1, commits[0], step), commits[0] + 1, len(changes)]:
        folder = extended.copy()
        assert extended.play.run(folder, AtOperation(number, Kill()), more=LONGER).code == -9
        ended = extended.play.run(folder, more=LONGER)
        assert ended.code == 0, (changes[number - 1], ended.said)
        assert differences(folder, expected) == [], changes[number - 1]
        assert json.loads((folder / "changes.json").read_text()) == json.loads((whole / "changes.json").read_text())


def test_what_was_allowed_once_needs_no_second_word(extended):
    folder = extended.killed_in(5)
    ended = extended.play.run(folder, more=LONGER[:3])
    assert ended.code == 0, ended.said
    assert "allowed: train.max_steps: None (checkpoint) != 7 (now)" in ended.out
    assert [change["step"] for change in json.loads((folder / "changes.json").read_text())] == [4]


def test_the_checkpoints_own_settings_are_no_change(extended, thorough):
    """Killed before the first new checkpoint, gone back to what it was, and killed again at every change of that."""
    killed = extended.killed_in(5)
    record, folder = Record(extended.play.new().parent / "log"), extended.play.copy(killed)
    assert extended.play.run(folder, record).code == 0
    changes = record.read()
    end = next(n for n, change in enumerate(changes) if change.startswith("open .tmp-adapter"))
    step = {"sft": 2, "dpo": 7}[extended.play.case.method] if thorough else 15
    for number in range(1, end + 1, step):
        folder = extended.play.copy(killed)
        assert extended.play.run(folder, AtOperation(number, Kill())).code == -9
        assert extended.play.resumed(folder) == [], changes[number - 1]
    assert json.loads((folder / "changes.json").read_text()) == []
    assert "max_steps" not in tomllib.loads((folder / "config.toml").read_text())["train"]
    again = extended.play.run(folder, more=(*LONGER[:3], "--allow-change", "train.seed"))
    assert again.code == 2 and "changed: train.max_steps" in again.err
