"""Files and folders are replaced whole or not at all: against kills at every point, refusing disks and exceptions."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoint_files import Killed, kill_before, names
from safetensors import SafetensorError

from lowlevel.checkpoints.checkpoint import remove_litter
from lowlevel.durable import replaced_file, replaced_folder, write_given_json, write_json, write_text
from lowlevel.errors import CheckpointError


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def replace(target: Path, text: str) -> None:
    with replaced_folder(target) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(text)


OLD, NEW = ({"a": text, "b": text} for text in ("old", "new"))


def killed_at_every_point(tmp_path: Path, prepare, write):
    """Folders in which `write` was killed before its first, second, ... file operation, and one where it was not."""
    for kills in range(100):
        folder = tmp_path / str(kills)
        folder.mkdir()
        prepare(folder)
        try:
            with pytest.MonkeyPatch.context() as patch:
                kill_before(patch, kills)
                write(folder)
        except Killed:
            yield folder, True
        else:
            yield folder, False
            return
    pytest.fail("it never ends")


def test_a_kill_at_every_point_leaves_the_old_folder_or_the_new_one(tmp_path):
    """Between the two renames too, where neither is in its place until the next start."""
    found, aside = [], 0
    for folder, killed in killed_at_every_point(
        tmp_path, lambda f: replace(f / "adapter", "old"), lambda f: replace(f / "adapter", "new")
    ):
        aside += ".old-adapter" in names(folder) and "adapter" not in names(folder)
        remove_litter(folder)
        assert names(folder) == ["adapter"]
        found.append(content(folder / "adapter"))
        assert found[-1] in (OLD, NEW) and (killed or found[-1] == NEW)
    assert len(found) > 12 and found == sorted(found, key=lambda one: one == NEW), "once new, it stays new"
    assert OLD in found and aside >= 1


def test_a_kill_at_every_point_leaves_a_new_folder_or_none(tmp_path):
    for folder, _ in killed_at_every_point(tmp_path, lambda f: None, lambda f: replace(f / "adapter", "new")):
        remove_litter(folder)
        assert not names(folder) or content(folder / "adapter") == NEW


def test_a_kill_at_every_point_leaves_the_old_file_or_the_new_one(tmp_path):
    found = []
    for folder, _ in killed_at_every_point(
        tmp_path, lambda f: (f / "a").write_text("old"), lambda f: write_text(f / "a", "new")
    ):
        remove_litter(folder)
        found.append(content(folder))
    assert len(found) > 3 and all(one in ({"a": "old"}, {"a": "new"}) for one in found) and {"a": "old"} in found


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_exception_leaves_what_was_there(tmp_path, error):
    replace(tmp_path / "folder", "old")
    (tmp_path / "file").write_text("old")
    for make, half in ((replaced_folder, "folder"), (replaced_file, "file")):
        with pytest.raises(error), make(tmp_path / half) as temporary:
            (temporary / "a" if half == "folder" else temporary).write_text("half")
            raise error
    assert names(tmp_path) == ["file", "folder"]
    assert content(tmp_path / "folder") == OLD and (tmp_path / "file").read_text() == "old"


def test_a_disk_that_cannot_promise_the_move_leaves_the_old_folder(tmp_path, monkeypatch):
    replace(tmp_path / "folder", "old")
    original, place = os.fsync, tmp_path.stat().st_ino

    def fail(descriptor):
        if os.fstat(descriptor).st_ino == place:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        replace(tmp_path / "folder", "new")
    assert names(tmp_path) == ["folder"] and content(tmp_path / "folder") == OLD


def test_what_killed_processes_left_is_in_nobodys_way(tmp_path):
    """In a container every process may have the same number."""
    replace(tmp_path / "folder", "old")
    for name in (f".tmp-folder-{os.getpid()}", ".old-folder"):
        replace(tmp_path / name, "of a killed process")
    replace(tmp_path / "folder", "new")
    assert names(tmp_path) == ["folder"] and content(tmp_path / "folder") == NEW


WRITER = """
import sys, pathlib
from lowlevel import durable
with getattr(durable, sys.argv[1])(pathlib.Path(sys.argv[2])) as temporary:
    (temporary / "a" if temporary.is_dir() else temporary).write_text("of another process")
    print(temporary.name, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another_writer(kind: str, target: Path):
    """A process in the middle of replacing `target`, and the name of its temporary."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:  # fmt: skip
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["replaced_file", "replaced_folder"])
def test_what_a_killed_process_left_is_removed_by_the_next_writer_of_its_name(tmp_path, kind):
    target, others = tmp_path / "target", [".tmp-target", ".tmp-target-mine", ".tmp-target.png-77", ".tmp-targe-77"]
    for name in others:
        (tmp_path / name).write_text("")

    def write() -> None:
        write_text(target, "new") if kind == "replaced_file" else replace(target, "new")

    with another_writer(kind, target) as (process, temporary):
        write()
        assert names(tmp_path) == sorted([*others, "target", temporary]), "it lives, and has not ended"
        process.kill()
        assert process.wait() == -9
    write()
    assert names(tmp_path) == sorted([*others, "target"])
    assert (content(target) == NEW) if kind == "replaced_folder" else (target.read_text() == "new")


@pytest.mark.parametrize("kind", ["replaced_file", "replaced_folder"])
def test_a_living_writer_is_in_nobodys_way_and_ends_as_it_would_alone(tmp_path, kind):
    target = tmp_path / "target"
    with another_writer(kind, target) as (process, _):
        write_text(target, "new") if kind == "replaced_file" else replace(target, "new")
        process.communicate("\n")
        assert process.returncode == 0
    assert names(tmp_path) == ["target"]
    written = target / "a" if kind == "replaced_folder" else target
    assert written.read_text() == "of another process"


def test_two_living_writers_of_one_number(tmp_path):
    """As in two containers that share a folder."""
    with replaced_file(tmp_path / "a") as outer:
        outer.write_text("outer")
        with replaced_file(tmp_path / "a") as inner:
            inner.write_text("inner")
        assert (tmp_path / "a").read_text() == "inner"
    assert (tmp_path / "a").read_text() == "outer" and names(tmp_path) == ["a"]


def test_a_temporary_that_another_removes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    original, removed = fcntl.flock, []

    def flock(descriptor, how):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        original(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    write_text(tmp_path / "a", "new")
    assert len(removed) == 1 and content(tmp_path) == {"a": "new"}


def test_without_locks_nothing_is_removed_and_all_is_written(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    left = f".tmp-a-{os.getpid()}"
    (tmp_path / left).write_text("of who knows whom")
    write_text(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": "new", left: "of who knows whom"}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_damage_put_in_the_place_of_a_folder_is_replaced(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    target = tmp_path / "folder"
    target.write_text("x") if kind == "file" else target.symlink_to(tmp_path / "elsewhere")
    replace(target, "new")
    assert content(target) == NEW and not target.is_symlink()
    assert names(tmp_path) == ["elsewhere", "folder"] and content(tmp_path / "elsewhere") == {"mine": "mine"}


def test_json_files_are_replaced_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="full"):
            write_json(tmp_path / "a.json", {"new": "x" * 1000})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


RUST = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("raised", "number", "reason"),
    [
        (SafetensorError(RUST), errno.ENOSPC, "No space left on device"),
        (Exception(RUST), errno.ENOSPC, "No space left on device"),  # of tokenizers
        (OSError(errno.EROFS, "Read-only"), errno.EROFS, "Read-only"),
        (OSError(errno.EROFS, "Read-only", "x/.tmp-a-1/config.json"), errno.EROFS, "Read-only"),
        (OSError("81920 requested and 1056 written"), errno.EIO, "81920 requested and 1056 written"),  # numpy's tofile
    ],
)
@pytest.mark.parametrize("replaced", [replaced_file, replaced_folder])
def test_every_error_of_a_disk_is_an_oserror_that_names_the_target(tmp_path, replaced, raised, number, reason):
    with pytest.raises(OSError) as caught, replaced(tmp_path / "a"):
        raise raised
    error = caught.value
    assert (error.errno, error.strerror, error.filename) == (number, reason, str(tmp_path / "a"))
    assert not names(tmp_path)


@pytest.mark.parametrize("raised", [CheckpointError("a (os error 2)"), OSError(2, "No such file", "a"), KeyError()])
def test_other_errors_stay_as_they_are(tmp_path, raised):
    with pytest.raises(type(raised)) as caught, replaced_folder(tmp_path / "a"):
        raise raised
    assert caught.value is raised


def test_a_given_path_may_be_a_link_or_a_pipe(tmp_path):
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_given_json(link, {"new": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"new": 1}
    write_given_json(tmp_path / "plain.json", 2)
    assert json.loads((tmp_path / "plain.json").read_text()) == 2
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_given_json(pipe, [3])
        assert json.loads(os.read(reader, 100)) == [3]
    finally:
        os.close(reader)
    assert pipe.is_fifo()
