"""Saving against kills and full disks."""

import errno
import math
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import PAYLOAD, Killed, fail_with, flip, kill_before, names, save
from safetensors.torch import save_file

from lowlevel.checkpoints.checkpoint import checkpoints, remove_litter, save_checkpoint, verify
from lowlevel.errors import CheckpointError


def good(folder: Path) -> set[str]:
    """Names of the checkpoints that verify."""
    found = set()
    for path in checkpoints(folder):
        try:
            verify(path)
            found.add(path.name)
        except CheckpointError:
            pass
    return found


@pytest.mark.parametrize("step", [2, 3], ids=["a step again", "a new step"])
def test_a_kill_at_every_point_of_a_save_loses_no_checkpoint(tmp_path, step):
    """Between any two file operations of a save, the older one's retirement included, and again at the start after."""
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        save(folder, 1)
        save(folder, 2)
        try:
            with pytest.MonkeyPatch.context() as patch:
                kill_before(patch, kills)
                save(folder, step, keep=2)
        except Killed:
            pass
        else:
            break
        remove_litter(folder)
        assert len(good(folder)) >= 2 and "step-00000002" in good(folder), f"killed before operation {kills + 1}"
        assert not [name for name in names(folder) if name.startswith(".")]
        kills += 1
    assert kills > 15
    assert good(folder) == ({"step-00000001", "step-00000002"} if step == 2 else {"step-00000002", "step-00000003"})


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_a_save_that_is_interrupted_leaves_no_part(tmp_path, end):
    old = save(tmp_path, 1)
    with pytest.raises(end):
        save_checkpoint(tmp_path, 2, fail_with(end()), PAYLOAD, keep=1)
    assert names(tmp_path) == [old.name]


def test_a_disk_that_cannot_promise_the_move_has_saved_nothing(tmp_path, monkeypatch):
    """The folder's own fsync, after the rename: what was there for this step is there again."""
    old = save(tmp_path, 1)
    before = {path: path.read_bytes() for path in old.iterdir()}
    original = os.fsync
    folder_id = tmp_path.stat().st_ino

    def fail(descriptor):
        if os.fstat(descriptor).st_ino == folder_id:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor)

    for step in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(CheckpointError, match="not saved: Input/output error"):
                save(tmp_path, step, keep=1)
        assert names(tmp_path) == [old.name]
        assert before == {path: path.read_bytes() for path in before}


def test_a_save_needs_a_fifth_more_room_than_the_newest_checkpoint(tmp_path, monkeypatch):
    old = save(tmp_path, 1)
    size = sum(path.stat().st_size for path in old.iterdir())
    usage = type(shutil.disk_usage(tmp_path))
    needed = math.ceil(1.2 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - needed + 1, needed - 1))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path, 2, pytest.fail, PAYLOAD, keep=1)
    assert str(caught.value) == (
        f"{tmp_path / 'step-00000002'}: not saved: No space left on device ({needed:,} bytes needed, {needed - 1:,} "
        "bytes free); the last good checkpoint is step-00000001"
    )
    assert names(tmp_path) == [old.name]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - needed, needed))
    save(tmp_path, 2)


def test_the_last_good_one_is_named_not_the_newest(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "adapter_config.json", 3)
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(CheckpointError, match="the last good checkpoint is step-00000001$"):
        save_checkpoint(tmp_path, 3, fail_with(error), PAYLOAD, keep=1)
    with pytest.raises(CheckpointError, match="there is no checkpoint before it$"):
        (tmp_path / "other").mkdir()
        save_checkpoint(tmp_path / "other", 3, fail_with(error), PAYLOAD, keep=1)


def test_a_failed_write_leaves_nothing_and_keeps_the_old_ones(tmp_path):
    old = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-00000002: not saved: No space left on device .*bytes free"):
        save_checkpoint(tmp_path, 2, fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), PAYLOAD, keep=1)
    assert names(tmp_path) == [old.name]
    verify(old)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_sync_or_rename_leaves_nothing_either(tmp_path, monkeypatch, call):
    old = save(tmp_path, 1)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match="not saved: Input/output error"):
            save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [old.name]
    verify(old)


def test_a_full_disk_in_safetensors_is_a_failed_write(tmp_path):
    """A real one, by the kernel's limit on a file's size: safetensors writes from Rust and raises no OSError."""
    old = save(tmp_path, 1)

    def write(folder: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # Python ignores SIGXFSZ: the write fails
        try:
            save_file({"a": torch.zeros(100_000)}, folder / "adapter_model.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(CheckpointError, match="step-00000002: not saved: .*File too large"):
        save_checkpoint(tmp_path, 2, write, PAYLOAD, keep=1)
    assert names(tmp_path) == [old.name]
    verify(old)


def test_litter_of_a_killed_save_is_removed_and_nothing_else(tmp_path):
    old = save(tmp_path, 1)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for name in (".tmp-step-00000002-77", ".del-step-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    (tmp_path / ".tmp-config.toml-77").write_text("x")
    remove_litter(tmp_path)
    assert names(tmp_path) == ["metrics.jsonl", old.name]


def test_hidden_folders_of_a_persons_own_are_no_litter(tmp_path):
    for name in (".old-notes", ".old-photos", ".tmp-mine", ".del-me", ".old-step-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("x")
    (tmp_path / "notes").mkdir()
    before = names(tmp_path)
    remove_litter(tmp_path)
    assert names(tmp_path) == before and (tmp_path / ".old-notes" / "mine.txt").exists()
