"""However a run ends: one line, its exit code, a run-status.json that says so, and nothing half-written."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from workspace import Workspace, at_step, make_workspace, metrics, run, status, stop_at

import lowlevel.checkpoints.checkpoint
import lowlevel.checkpoints.training_state
import lowlevel.running.beginning
import lowlevel.running.job
import lowlevel.running.run_folder
import lowlevel.running.run_record
import lowlevel.running.training
from lowlevel.checkpoints.checkpoint import checkpoints, verify
from lowlevel.running.run_folder import run_lock

STOP = 3
EVERY = {"logging_steps": 1, "save_steps": 1, "eval_steps": 2}
HOLDOUT = {"eval_source": "holdout", "eval_limit": 4}
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Workspace:
    """A workspace with a whole run, and one that SIGTERM stopped after step 3 of 6."""
    space = make_workspace(tmp_path_factory.mktemp("endings"))
    assert run("sft", space.write("whole", "sft", train=EVERY, data=HOLDOUT)).code == 0
    path = space.write("stopped", "sft", train=EVERY, data=HOLDOUT)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, STOP)
        assert run("sft", path).code == 143
    return space


def before(patch: pytest.MonkeyPatch, module, name: str, do, *, times: int = 1) -> None:
    """Do something before each of the first `times` calls of a function."""
    original, left = getattr(module, name), [times]

    def call(*arguments, **keywords):
        if left[0]:
            left[0] -= 1
            do()
        return original(*arguments, **keywords)

    patch.setattr(module, name, call)


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.startswith((".tmp-", ".old-", ".del-"))]


def content(folder: Path) -> dict:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("run.lock", "run-status.json")
    }


def assert_whole(folder: Path, space: Workspace) -> None:
    """The run has the end of the one that nothing happened to."""
    whole = space.folder / "whole"
    for name in ("adapter/adapter_model.safetensors", "step-00000006/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    losses = [[record.get("loss") for record in metrics(run)] for run in (folder, whole)]
    assert losses[0] == losses[1] and not litter(folder)
    assert (status(folder)["state"], status(folder)["exit"], status(folder)["step"]) == ("finished", 0, 6)


PLACES = {
    "check_run": lowlevel.running.beginning,
    "restore_state": lowlevel.running.beginning,
    "build_run_policy": lowlevel.running.job,
    "evaluate_examples": lowlevel.running.job,
}


@pytest.mark.parametrize(
    ("place", "signum", "code"),
    [("check_run", *SIGNALS[0]), ("build_run_policy", *SIGNALS[1]), ("evaluate_examples", *SIGNALS[0])],
)
def test_a_signal_before_the_first_step_ends_the_run_at_once(space, tmp_path, monkeypatch, signum, code, place):
    path = space.write("early", "sft", folder=tmp_path, train=EVERY, data=HOLDOUT)
    with monkeypatch.context() as patch:
        before(patch, PLACES[place], place, lambda: os.kill(os.getpid(), signum))
        at_step(patch, 1, lambda: pytest.fail("a step was taken"))
        said = run("sft", path)
    name = signal.Signals(signum).name
    assert (said.code, said.err) == (code, f"stopped by {name} outside of training: no step is lost\n")
    made = {file.name for file in (tmp_path / "early").iterdir()} if (tmp_path / "early").exists() else set()
    if place == "evaluate_examples":
        assert (status(tmp_path / "early")["state"], status(tmp_path / "early")["exit"]) == ("stopped", code)
    else:
        assert made == (set() if place == "check_run" else {"run.lock"})
    assert signal.getsignal(signum) is (signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    said = run("sft", path, *(["--resume"] if place == "evaluate_examples" else []))
    assert said.code == 0, said.err
    assert_whole(tmp_path / "early", space)


def test_a_signal_while_a_run_compiles_waits_for_the_compiler(space, tmp_path, monkeypatch, capfd):
    compiled = []

    def rehearse(engine):
        os.kill(os.getpid(), signal.SIGINT)
        compiled.append(engine)

    with monkeypatch.context() as patch:
        patch.setattr(lowlevel.running.job.Engine, "rehearse", rehearse)
        at_step(patch, 1, lambda: pytest.fail("a step was taken"))
        said = run("sft", space.write("early", "sft", folder=tmp_path, train=EVERY, data=HOLDOUT))
    assert said.code == 130, said.err
    assert compiled and status(tmp_path / "early")["state"] == "stopped"
    assert "stopping when the compiler has finished" in said.err + capfd.readouterr().err


def test_a_second_signal_while_a_run_compiles_ends_the_process():
    code = "import os; from lowlevel.running.endings import Interrupts as I\nwith I() as one, one.compiling():\n"
    code += "    try: os.kill(os.getpid(), 15); os.kill(os.getpid(), 15)\n    finally: print('unwound')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "")


@pytest.mark.parametrize("place", ["check_run", "restore_state"])
def test_a_signal_while_a_run_is_set_up_again_changes_nothing(space, copied, resume, monkeypatch, place):
    held = content(copied)
    with monkeypatch.context() as patch:
        before(patch, PLACES[place], place, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert resume().code == 143
    assert content(copied) == held
    assert (status(copied)["state"], status(copied)["checkpoint"]) == ("stopped", f"step-{STOP:08d}")
    assert resume().code == 0
    assert_whole(copied, space)


@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_second_signal_during_a_save_ends_the_process_and_shows_no_part(
    space, copied, resume, monkeypatch, signum, code
):
    def twice() -> None:
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)

    told, write = [], os.write
    with monkeypatch.context() as patch:
        before(patch, lowlevel.checkpoints.training_state, "save_file", twice)
        patch.setattr(os, "write", lambda to, text: told.append(text) or len(text) if to == 2 else write(to, text))
        said = resume()
    first = b"\nstopping when this step is saved; a second signal ends the process at once\n"
    assert said.code == code and told == [first, b"\nended at once by a second signal; what was saved before stays\n"]
    assert checkpoints(copied)[0].name == f"step-{STOP:08d}" and verify(checkpoints(copied)[0]) and not litter(copied)
    ended = status(copied)
    assert (ended["state"], ended["exit"], ended["error"]) == ("failed", code, "ended at once by a second signal")
    assert resume().code == 0
    assert_whole(copied, space)


def test_a_signal_during_an_evaluation_or_a_save_stops_after_it(space, copied, resume, monkeypatch):
    for module, name, step in (
        (lowlevel.running.job, "evaluate_examples", 4),
        (lowlevel.checkpoints.training_state, "save_file", 5),
    ):
        with monkeypatch.context() as patch:
            before(patch, module, name, lambda: os.kill(os.getpid(), signal.SIGTERM))
            said = resume()
        line = f"stopped at step {step} of 6 and saved; continue with: lowlevel sft "
        assert said.code == 143 and said.err.startswith(line) and said.err.count("--resume") == 1, said.err
        assert (status(copied)["state"], status(copied)["step"]) == ("stopped", step)
    assert resume().code == 0
    assert_whole(copied, space)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_result_is_written_lets_it_be_written(space, copied, resume, monkeypatch, signum):
    before(monkeypatch, lowlevel.running.run_record, "save_adapter", lambda: os.kill(os.getpid(), signum))
    assert resume().code == 0
    assert_whole(copied, space)


def refuse(patch: pytest.MonkeyPatch, name: str) -> None:
    """The disk has no room for the file `name`, whoever writes it."""
    original = os.replace

    def replace(source, target, **keywords):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))
        return original(source, target, **keywords)

    patch.setattr(os, "replace", replace)


@pytest.mark.parametrize("name", ["metrics.jsonl", "run-status.json", "summary.json", "loss.png"])
def test_a_full_disk_anywhere_is_one_line_and_keeps_the_last_checkpoint(space, copied, resume, monkeypatch, name):
    with monkeypatch.context() as patch:
        refuse(patch, name)
        said = resume()
    assert said.code == 4
    saved = checkpoints(copied)[0].name
    assert said.err == (f"error: {copied / name}: No space left on device; the last good checkpoint is {saved}\n")
    verify(copied / saved)
    assert not litter(copied)
    if name != "run-status.json":
        assert (status(copied)["state"], status(copied)["exit"], status(copied)["checkpoint"]) == ("failed", 4, saved)
    assert resume().code == 0
    assert_whole(copied, space)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_line_that_the_disk_refuses_leaves_no_part_of_it(space, copied, resume, monkeypatch, error):
    class Refusing:
        """A disk with room for 10 more bytes."""

        def __init__(self, *arguments, **keywords):
            self.file, self.full = open(*arguments, **keywords), False

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if self.full:
                raise OSError(error, os.strerror(error))
            self.full = True
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def opened(path, *arguments, **keywords):
        return (Refusing if Path(path).name == "metrics.jsonl" else open)(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(lowlevel.durable, "open", opened, raising=False)
        said = resume()
    assert said.code == 4
    assert said.err == (
        f"error: {copied / 'metrics.jsonl'}: {os.strerror(error)}; the last good checkpoint is step-{STOP:08d}\n"
    )
    assert [record["step"] for record in metrics(copied)] == [0, 1, 2, 2, 3]
    assert resume().code == 0
    assert_whole(copied, space)


@pytest.mark.parametrize("call", ["save_adapter", "write_stacked_adapter"])
def test_an_adapter_that_the_disk_refuses_is_not_there_in_part(space, tmp_path, monkeypatch, call):
    parent = helpers.save_random_adapter(space.base, tmp_path / "parent")
    path = space.write("dpo", "dpo", folder=tmp_path, train={"max_steps": 1}, model={"adapter": str(parent)})

    def fail(*arguments, **options):
        (arguments[2] / "adapter_config.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[2] / "adapter_model.safetensors"))

    with monkeypatch.context() as patch:
        patch.setattr(lowlevel.running.run_record, call, fail)
        said = run("dpo", path)
    assert said.code == 4 and said.err.endswith("No space left on device; the last good checkpoint is step-00000001\n")
    assert not (tmp_path / "dpo" / ("adapter" if call == "save_adapter" else "stacked")).exists()
    assert not litter(tmp_path / "dpo")
    assert run("dpo", path, "--resume").code == 0


def test_lines_are_on_disk_before_the_checkpoint_of_their_steps(space, tmp_path, monkeypatch):
    """Inodes that fsync saw, in order with the renames: the log since its last line, then the checkpoint's name."""
    events = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        return fsync(descriptor)

    def record_rename(source, target, **keywords):
        events.append(("rename", Path(target).name, 0))
        return rename(source, target, **keywords)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    path = space.write("run", "sft", folder=tmp_path, train={**EVERY, "eval_steps": None})
    assert run("sft", path).code == 0
    log = tmp_path / "run" / "metrics.jsonl"
    sizes = [size for kind, inode, size in events if kind == "fsync" and inode == log.stat().st_ino and size]
    ends = [len(b"".join(log.read_bytes().splitlines(keepends=True)[: n + 1])) for n in range(6)]
    assert sizes == ends, "after every line, since every step is saved"
    names = [name if kind == "rename" else size for kind, name, size in events]
    for step, end in enumerate(ends, 1):
        assert names.index(end) < names.index(f"step-{step:08d}")


def test_a_damaged_log_is_named_and_a_resume_drops_the_line(space, copied, resume):
    """A power cut may leave zeros in the place of the lines after the last checkpoint."""
    with open(copied / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 20 + b"\n" + b'{"step": "x"}\n')
    said = run("report", copied)
    assert said.code == 4 and f"{copied / 'metrics.jsonl'}:6: not a record; --resume drops it" in said.err
    assert resume().code == 0
    assert_whole(copied, space)


def test_an_error_of_the_program_is_in_the_status_too(space, copied, resume, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(lowlevel.running.training, "train", fail)
    assert resume().code == 1
    ended = status(copied)
    assert (ended["state"], ended["exit"], ended["error"]) == ("failed", 1, "RuntimeError: no such thing")
    assert (ended["step"], ended["checkpoint"]) == (STOP, f"step-{STOP:08d}")


def test_a_run_that_goes_on_is_running(copied, resume, monkeypatch):
    seen = []
    at_step(monkeypatch, STOP + 1, lambda: seen.append(status(copied)))
    assert resume().code == 0
    assert seen == [{"state": "running", "step": STOP, "checkpoint": f"step-{STOP:08d}", "exit": None, "error": None}]


def test_the_status_names_the_newest_good_checkpoint(copied, resume):
    file = checkpoints(copied)[0] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (copied / checkpoints(copied)[1].name / "manifest.json").unlink()
    said = resume()
    assert said.code == 4 and said.err.count("step-0000000") == 2, "each with its reason"
    assert (status(copied)["state"], status(copied)["exit"], status(copied)["checkpoint"]) == ("failed", 4, None)


def test_a_run_in_use_is_left_alone(copied, resume):
    held = {**content(copied), "status": (copied / "run-status.json").read_bytes()}
    with run_lock(copied):
        assert resume().code == 2
    assert held == {**content(copied), "status": (copied / "run-status.json").read_bytes()}


def test_an_output_folder_that_cannot_be_made_is_one_line(space, tmp_path):
    (tmp_path / "file").write_text("x")
    path = space.write("run", "sft", folder=tmp_path)
    said = run("sft", path, "--train.output_dir", tmp_path / "file" / "run")
    assert (said.code, said.err) == (
        4, f"error: {tmp_path / 'file' / 'run'}: Not a directory\n"
    )  # fmt: skip


@pytest.fixture(scope="module")
def merged_base_run(space, tmp_path_factory) -> Path:
    """adapter_mode "original", called from another folder with relative paths, stopped after step 1."""
    folder = tmp_path_factory.mktemp("merged")
    parent = helpers.save_random_adapter(space.base, folder / "parent")
    path = space.write("run", "dpo", folder=folder, train={"max_steps": 2, "save_steps": 1, "output_dir": "run"},
                       model={"adapter": str(parent), "adapter_mode": "original"})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stop_at(patch, 1)
        assert run("dpo", path).code == 143
    return folder / "run"


@pytest.mark.parametrize("own_config", [True, False])
def test_a_run_with_its_own_base_may_be_moved(merged_base_run, tmp_path, own_config):
    """Resumed with its first run file or its own config.toml, and inspected, from another working folder."""
    assert 'name = "./base"' in (merged_base_run / "config.toml").read_text()
    moved = Path(shutil.copytree(merged_base_run, tmp_path / "else where"))
    path = moved / "config.toml" if own_config else merged_base_run.with_suffix(".toml")
    said = run("dpo", path, "--train.output_dir", moved, "--resume")
    assert said.code == 0, said.err
    assert "resumed from step-00000001" in said.out
    assert run("inspect", moved, "--step", 2).code == 0
    assert json.loads((moved / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        moved / "base"
    )
    for file in [*moved.rglob("manifest.json"), *moved.glob("step-*/adapter_config.json"), moved / "run-status.json"]:
        for place in (merged_base_run.parent, moved.parent):
            assert str(place) not in file.read_text(), file


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_files_have_the_modes_that_the_umask_says(space, tmp_path, mask):
    parent = helpers.save_random_adapter(space.base, tmp_path / "parent")
    train, model = {"max_steps": 2, "save_steps": 1}, {"adapter": str(parent), "adapter_mode": "original"}
    path = space.write("run", "dpo", folder=tmp_path, train=train, model=model, trace={"every": 1})
    previous = os.umask(mask)
    try:
        assert run("dpo", path).code == 0
    finally:
        os.umask(previous)
    for made in (tmp_path / "run").rglob("*"):
        expected = (0o777 if made.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(made.stat().st_mode) == expected, made
