"""The folder for runs, and the hub's cache."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from lowlevel.preflight import device


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    answer = device.run_folder(tmp_path)
    assert answer.verdict == "ok" and str(tmp_path) in answer.found and "GiB free" in answer.found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_yet(tmp_path):
    answer = device.run_folder(tmp_path / "out" / "run")
    assert answer.verdict == "ok" and f"{tmp_path} can be" in answer.found
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "out").write_text("")
    assert device.run_folder(tmp_path / "out").verdict == "FAIL"


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir"])
def test_a_disk_that_refuses(tmp_path, monkeypatch, call):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, call, refuse)
    answer = device.run_folder(tmp_path)
    monkeypatch.undo()
    assert answer.verdict == "FAIL" and "Read-only file system" in answer.found
    assert list(tmp_path.iterdir()) == []


def test_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=device.LITTLE_ROOM - 1))
    answer = device.run_folder(tmp_path)
    assert answer.verdict == "note" and "2.0 GiB free" in answer.found


@pytest.mark.parametrize(("offline", "models", "verdict"), [
    (False, 0, "ok"), (False, 2, "ok"), (True, 2, "ok"), (True, 0, "note"),
])  # fmt: skip
def test_the_hub(tmp_path, monkeypatch, offline, models, verdict):
    cache = tmp_path / "hub"
    for number in range(models):
        (cache / f"models--org--name{number}").mkdir(parents=True)
    monkeypatch.setattr(device.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(device.constants, "HF_HUB_OFFLINE", offline)
    answer = device.hub()
    assert answer.verdict == verdict
    assert f"{cache}, {models} models in it, offline mode {'on' if offline else 'off'}" in answer.found


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(device.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(device.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    answer = device.hub()
    assert answer.verdict == "note" and "HF_HOME" in answer.advice
