"""Checkpoints against damage, full disks and second writers."""

import errno
import hashlib
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowlevel.checkpoint import (
    MANIFEST,
    checkpoints,
    newest_verified,
    remove_litter,
    run_lock,
    save_checkpoint,
    verify,
    write_json,
)
from lowlevel.errors import CheckpointError, ConfigError

PAYLOAD = {
    "state": {"step": 3, "loss": 0.1234567890123456, "rate": 1.5e-05, "none": None},
    "identity": {"method": "sft"},
}


def write_files(folder: Path) -> None:
    save_file({"a": torch.arange(50.0), "b": torch.ones(3)}, folder / "adapter_model.safetensors")
    save_file({"flat::state1": torch.arange(70.0)}, folder / "optimizer.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 4, "peft_type": "LORA"}\n')


def save(folder: Path, step: int, keep: int = 9) -> Path:
    folder.mkdir(exist_ok=True)
    return save_checkpoint(folder, step, write_files, PAYLOAD, keep=keep)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    path = save(tmp_path, 3)
    assert path.name == "step-00000003"
    payload = verify(path)
    assert {key: payload[key] for key in PAYLOAD} == PAYLOAD and payload["step"] == 3
    assert set(payload["files"]) == set(names(path)) - {MANIFEST}
    assert newest_verified(tmp_path, pytest.fail) == (path, payload)
    assert newest_verified(tmp_path / "empty", pytest.fail) is None


FILES = ("adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json")


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_of_a_file_is_seen(tmp_path, name):
    path = save(tmp_path, 1)
    file = path / name
    size = 8 * file.stat().st_size
    for bit in {0, size - 1, *random.Random(name).sample(range(size), 40)}:
        flip(file, bit)
        with pytest.raises(CheckpointError, match=name):
            verify(path)
        flip(file, bit)
    verify(path)


def test_a_flipped_bit_of_the_manifest_is_seen_or_means_the_same(tmp_path):
    """The hash is over the parsed values, so "1.5e-05" may become "1.5E-05" and no more than that."""
    path = save(tmp_path, 1)
    file, payload = path / MANIFEST, verify(path)
    size, unseen = 8 * file.stat().st_size, 0
    exponent = 8 * file.read_bytes().index(b"1.5e-05") + 8 * 3 + 5
    for bit in [exponent, *random.Random(0).sample(range(size), 400)]:
        flip(file, bit)
        try:
            assert verify(path) == payload
            unseen += 1
        except CheckpointError:
            pass
        flip(file, bit)
    assert 1 <= unseen <= 3


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "empty", "append", "delete", "folder"])
def test_other_damage_to_a_file_is_seen(tmp_path, name, damage):
    path = save(tmp_path, 1)
    file = path / name
    data = file.read_bytes()
    if damage in ("delete", "folder"):
        file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "delete":
        file.write_bytes({"truncate": data[:-1], "empty": b"", "append": data + b"\0"}[damage])
    with pytest.raises(CheckpointError):
        verify(path)


def test_extra_and_exchanged_files_are_seen(tmp_path):
    path = save(tmp_path, 1)
    (path / "extra.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"files differ: extra\.json"):
        verify(path)
    (path / "extra.json").unlink()
    verify(path)
    a, b = path / FILES[0], path / FILES[1]
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    with pytest.raises(CheckpointError):
        verify(path)


def test_a_link_with_the_right_content_is_refused_too(tmp_path):
    path = save(tmp_path / "run", 1)
    (path / FILES[0]).rename(tmp_path / "elsewhere")
    (path / FILES[0]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a plain file name"):
        verify(path)


def test_a_manifest_of_another_version_is_refused(tmp_path):
    from lowlevel.checkpoint import _payload_sha256

    path = save(tmp_path, 1)
    for key, value in (("version", 2), ("format", "other")):
        payload = {**verify(path), key: value}
        document = {"payload": payload, "payload_sha256": _payload_sha256(payload)}
        good = (path / MANIFEST).read_bytes()
        write_json(path / MANIFEST, document)
        with pytest.raises(CheckpointError, match="is not known here"):
            verify(path)
        (path / MANIFEST).write_bytes(good)


def test_the_newest_good_one_is_used_with_a_warning_for_each_bad_one(tmp_path):
    good = save(tmp_path, 1)
    for step in (2, 3):
        flip(save(tmp_path, step) / "optimizer.safetensors", 999)
    warnings: list[str] = []
    assert newest_verified(tmp_path, warnings.append)[0] == good
    assert len(warnings) == 2
    assert "step-00000003" in warnings[0] and "step-00000002" in warnings[1]
    assert all("optimizer.safetensors" in warning for warning in warnings)
    flip(good / "adapter_model.safetensors", 5)
    with pytest.raises(CheckpointError, match="no usable checkpoint among 3"):
        newest_verified(tmp_path, warnings.append)


def test_newest_is_by_number_and_only_whole_names_count(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "step-0000001").mkdir()
    (tmp_path / "step-00000999.bak").mkdir()
    (tmp_path / ".tmp-step-00000999-1").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (100, 10, 9)]


def test_retention_counts_only_good_ones(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    flip(tmp_path / "step-00000005" / "adapter_config.json", 3)
    save(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005", "step-00000006"]  # 4 is still needed as the second
    save(tmp_path, 7, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006", "step-00000007"]
    assert [path.name for path in checkpoints(tmp_path)][0] == "step-00000007"


def test_saving_a_step_again_replaces_it(tmp_path):
    path = save(tmp_path, 1)
    flip(path / "adapter_config.json", 3)
    save(tmp_path, 1)
    verify(path)


class Killed(BaseException):
    """A kill: nothing of the program runs after it."""


CALLS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir")


def kill_before(patch: pytest.MonkeyPatch, number: int) -> None:
    """Every file operation from the `number`-th on fails as if the process were gone, those of cleaning up too."""
    count = 0

    def counted(original):
        def call(*arguments, **keywords):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return original(*arguments, **keywords)

        return call

    for name in CALLS:
        patch.setattr(os, name, counted(getattr(os, name)))


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


def test_a_checkpoint_under_another_step_is_refused(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step-00000007")
    with pytest.raises(CheckpointError, match="holds step 1"):
        verify(tmp_path / "step-00000007")


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    path = save(tmp_path, 1)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path / FILES[0]))

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors cannot be read: Input/output error"):
        verify(path)


def fail_with(error: BaseException):
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        raise error

    return write


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


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from lowlevel.checkpoint import run_lock\n"
        "from lowlevel.errors import ConfigError\n"
        "try:\n"
        "    with run_lock(pathlib.Path(sys.argv[1])): print('got it')\n"
        "except ConfigError as error: print(error)\n"
    )

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        ).stdout  # fmt: skip

    with run_lock(tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"in use by pid {os.getpid()}"), run_lock(tmp_path / "run"):
            pass
        assert other() == f"{tmp_path / 'run'} is in use by pid {os.getpid()}\n"
    assert other() == "got it\n"
    with run_lock(tmp_path / "run"):
        pass


def test_json_files_are_replaced_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="full"):
            write_json(tmp_path / "a.json", {"new": "x" * 1000})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
