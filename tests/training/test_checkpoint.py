"""Checkpoints that were saved: what they give back, damage that is seen, and which one is taken."""

import errno
import hashlib
import os
import random

import pytest
from checkpoint_files import FILES, PAYLOAD, flip, names, save

from lowlevel.checkpoints import checkpoint
from lowlevel.checkpoints.checkpoint import (
    MANIFEST,
    checkpoint_at,
    checkpoints,
    newest_good,
    newest_verified,
    saved,
    step_of,
    verify,
)
from lowlevel.durable import write_json
from lowlevel.errors import CheckpointError, ConfigError


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    path = save(tmp_path, 3)
    assert path.name == "step-00000003"
    payload = verify(path)
    assert {key: payload[key] for key in PAYLOAD} == PAYLOAD and payload["step"] == 3
    assert set(payload["files"]) == set(names(path)) - {MANIFEST}
    assert newest_verified(tmp_path, pytest.fail) == (path, payload)
    assert newest_verified(tmp_path / "empty", pytest.fail) is None


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
    from lowlevel.checkpoints.checkpoint import _payload_sha256

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


def test_the_newest_good_one_before_a_step(tmp_path):
    paths = {step: save(tmp_path, step) for step in (2, 4, 6)}
    assert list(saved(tmp_path).items()) == [(step, paths[step]) for step in (6, 4, 2)]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [6, 4, 2]
    assert newest_good(tmp_path, pytest.fail) == (paths[6], verify(paths[6]))
    for before, step in ((7, 6), (6, 4), (5, 4), (3, 2)):
        assert newest_good(tmp_path, pytest.fail, before=before) == (paths[step], verify(paths[step]))
    assert newest_good(tmp_path, pytest.fail, before=2) is None
    for path in paths.values():
        flip(path / "optimizer.safetensors", 999)
    lines: list[str] = []
    assert newest_good(tmp_path, lines.append, before=6) is None, "it never raises"
    assert [f"skipped a damaged checkpoint: {paths[step]}/optimizer.safetensors" in line
            for step, line in zip((4, 2), lines, strict=True)] == [True, True]  # fmt: skip


def test_a_checkpoint_that_was_named(tmp_path):
    path = save(tmp_path, 4)
    assert checkpoint_at(tmp_path, 4, "--from") == (path, verify(path))
    with pytest.raises(ConfigError) as caught:
        checkpoint_at(tmp_path, 3, "--from")
    assert str(caught.value) == (
        f"--from 3: {tmp_path} has no such checkpoint; there are: 4, and 0 for the start of the run"
    )
    with pytest.raises(ConfigError, match="there are: none, and 0"):
        checkpoint_at(tmp_path / "empty", 3, "--checkpoint")
    flip(path / "optimizer.safetensors", 999)
    with pytest.raises(CheckpointError, match="optimizer.safetensors"):
        checkpoint_at(tmp_path, 4, "--from")


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


def test_a_save_reads_no_checkpoint_that_it_does_not_need_to(tmp_path, monkeypatch):
    """Of 3, 2 and 1 with keep=2, the second newest decides on the oldest; the newest was sealed a moment ago."""
    read = []
    monkeypatch.setattr(checkpoint, "verify", lambda path: read.append(path.name) or verify(path))
    for step, expected in ((1, []), (2, []), (3, ["step-00000002", "step-00000001"])):
        save(tmp_path, step, keep=2)
        assert read == expected
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path):
    path = save(tmp_path, 1)
    flip(path / "adapter_config.json", 3)
    save(tmp_path, 1)
    assert verify(path)["step"] == 1


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
