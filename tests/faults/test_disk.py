"""Disks that are full, refuse, or cannot be written at all: one line and exit 4, nothing half-written, nothing lost."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.faulting.actions import Refuse
from benchmarks.faulting.comparison import litter, newest_good
from benchmarks.faulting.damage import FILES
from benchmarks.faulting.operations import AtFile, AtOperation
from benchmarks.faulting.trials import disk_full, refused


def test_a_disk_that_is_full_in_the_middle_of_a_file(sft, thorough):
    for file in FILES if thorough else FILES[::3]:
        assert disk_full(sft, file, step=2) == [], file


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_disk_that_is_full_in_a_dpo_run(stage, file):
    from benchmarks.faulting.stage import Case

    assert disk_full(stage.play(Case("dpo")), file, step=4) == []


@pytest.fixture
def small_disk(tmp_path):
    """A real one of 1 MiB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "t", str(place)], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting is not permitted here; the tests above have the kernel refuse by file size")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_disk_of_a_mebibyte(sft, small_disk):
    """Filled between two steps: no room for the next checkpoint, said with both numbers; then there is room."""
    run, ballast = small_disk / "run", small_disk / "ballast"
    assert sft.run(run, AtFile(r"mkdir \.tmp-step-00000002", Fill(ballast))).code == 4
    assert newest_good(run) == 1 and litter(run) == []
    ended = sft.run(run)
    assert ended.code == 4 and "No space left on device" in ended.err
    assert re.search(r"[\d,]+ bytes needed, [\d,]+ bytes free", ended.err)
    assert newest_good(run) == 1 and litter(run) == []
    ballast.unlink()
    assert sft.resumed(run) == []


class Fill:
    """Write until the disk is full, 8 KiB excepted."""

    def __init__(self, ballast: Path) -> None:
        self.ballast = ballast

    def __call__(self, where: str) -> None:
        import shutil

        with open(self.ballast, "wb") as file:
            file.write(bytes(shutil.disk_usage(self.ballast.parent).free - 8192))


def save_changes(play) -> list[int]:
    """Numbers of the changes of the third save; it is the first one that deletes."""
    first, last = play.whole.saves()[2]
    return list(range(first, last + 1))


def test_a_disk_that_refuses_once_in_a_save(sft, thorough):
    for number, change in enumerate(save_changes(sft)[:: 4 if thorough else 9]):  # the others in the benchmark
        problems = refused(sft, change, ("EIO", "EACCES", "EROFS")[number % 3])
        assert problems == [], sft.whole.operations[change - 1]


@pytest.mark.slow
def test_a_disk_that_refuses_once_in_a_run(play):
    for change in range(2, len(play.whole.operations) + 1, 28):
        assert refused(play, change, "EIO") == [], play.whole.operations[change - 1]


def test_a_disk_that_refuses_from_some_moment_on(play, thorough):
    """The status cannot be written either; the error that ended the run is the only one."""
    saves = play.whole.saves()
    moments = [(3, "EROFS"), (saves[1][1] - 1, "EIO"), (saves[0][0], "EROFS"), (saves[3][1] + 8, "EACCES")]
    for change, error in moments if thorough else moments[1::2]:
        assert refused(play, change, error, for_good=True) == [], play.whole.operations[change - 1]


def test_the_order_of_writing(play):
    """Every file is on disk before the folder, the folder before the rename, the rename before anything else goes."""
    changes = play.whole.operations
    for step in range(1, play.whole.steps + 1):
        name = f".tmp-step-{step:08d}"
        renamed = changes.index(f"rename {name} step-{step:08d}")
        written = {c.split()[-1] for c in changes if c.startswith(("tensors write ", "write ")) and f" {name}/" in c}
        assert {Path(path).name for path in written} == set(FILES)
        for path in written:
            last_write = max(n for n, c in enumerate(changes) if c.endswith(f"write {path}"))
            assert last_write < changes.index(f"fsync {path}") < renamed
        assert max(changes.index(f"fsync {path}") for path in written) < changes.index(f"fsync {name}") < renamed
        assert changes[renamed + 1] == "fsync ."
        line = max(n for n, c in enumerate(changes[:renamed]) if c == "write metrics.jsonl")
        assert "fsync metrics.jsonl" in changes[line:renamed], "a checkpoint must not outlive the lines before it"
    deleted = [n for n, c in enumerate(changes) if re.match(r"rename step-\d+ \.del-", c)]
    assert len(deleted) == 2
    for number in deleted:
        assert changes[number - 1] == "fsync ." and changes[number - 2].startswith("rename .tmp-step-")


def test_what_a_finished_run_claims_is_on_disk(play):
    changes = play.whole.operations
    finished = max(n for n, c in enumerate(changes) if c == "replace .tmp-run-status.json run-status.json")
    for name in ("adapter", *(["stacked"] if play.case.method == "dpo" else [])):
        assert changes.index(f"fsync .tmp-{name}/adapter_model.safetensors") < changes.index(f"fsync .tmp-{name}")
        renamed = changes.index(f"rename .tmp-{name} {name}")
        assert changes.index(f"fsync .tmp-{name}") < renamed < finished and changes[renamed + 1] == "fsync ."


def test_refusing_is_seen_by_these_tests(sft):
    """A fault that never came would pass all of the above."""
    folder = sft.new()
    assert sft.run(folder, AtOperation(10**6, Refuse("EIO"))).code == 0
    assert refused(sft, 10**6, "EIO") != []
