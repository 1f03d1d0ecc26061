"""train.report_to: what the trackers get, read back from their own files, and what their failures do."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from workspace import make_workspace, metrics, run

from lowlevel.config.file import load_config
from lowlevel.running.trackers import Tracker, open_trackers

HIDDEN = "s3cr3t-of-a-tracker"
HELD_OUT = {"eval_source": "holdout", "eval_limit": 4}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("trackers"))


@pytest.fixture
def file(space, tmp_path):
    def write(*names: str, **train) -> Path:
        settings = {"report_to": list(names), "logging_steps": 1, "max_steps": 3, "save_steps": 1, **train}
        return space.write("run", "sft", folder=tmp_path, data=HELD_OUT, train=settings)

    return write


class Accumulator:
    """A run's TensorBoard events, by name: step -> value."""

    def __init__(self, folder: Path) -> None:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        self.events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        self.events.Reload()

    def scalars(self, name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self.events.Scalars(name)]


def test_tensorboard_gets_every_number_of_the_log(file, tmp_path):
    path = file("tensorboard")
    assert run("sft", path).code == 0
    found = Accumulator(tmp_path / "run")
    records = metrics(tmp_path / "run")
    names = {name for record in records for name, value in record.items() if isinstance(value, float)}
    assert {"loss", "eval_loss", "grad_norm", "learning_rate"} <= names
    for name in names:
        expected = [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records if name in record]
        assert found.scalars(name) == expected, name
    text = found.events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate = 0.01" in text and 'method = "sft"' in text


def test_a_resumed_run_repeats_no_step_in_tensorboard(file, tmp_path):
    assert run("sft", file("tensorboard")).code == 0
    (tmp_path / "run" / "step-00000003" / "adapter_model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert run("sft", file("tensorboard"), "--resume").code == 0
    steps = [step for step, _ in Accumulator(tmp_path / "run").scalars("loss")]
    assert steps == [record["step"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert run("sft", file(), "--restart").code == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


class FakeWandB:
    """What wandb offers to this package; keeps what it gets."""

    def __init__(self) -> None:
        self.inits, self.logged, self.finished = [], [], 0

    def Settings(self, **settings):  # noqa: N802 - wandb's name
        return SimpleNamespace(**settings)

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandB()
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_gets_configuration_and_numbers_and_a_resumed_run_continues_them(file, tmp_path, wandb):
    assert run("sft", file("wandb")).code == 0
    assert run("sft", file("wandb", max_steps=4), "--resume", "--allow-change", "train.max_steps").code == 0
    first, second = wandb.inits
    assert (first["project"], first["name"], first["dir"]) == ("lowlevel", "run", str(tmp_path / "run"))
    assert first["config"]["train"]["learning_rate"] == 1e-2
    assert (first["settings"].x_disable_meta, first["settings"].console) == (True, "off")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert wandb.finished == 2
    assert [(step, v["loss"]) for step, v in wandb.logged if "loss" in v] == [
        (record["step"], record["loss"]) for record in metrics(tmp_path / "run") if "loss" in record
    ]
    assert run("sft", file("wandb"), "--restart").code == 0
    assert wandb.inits[2]["id"] != first["id"]


def test_no_secret_is_sent(file, tmp_path, wandb, monkeypatch):
    path = file("wandb", output_dir=str(tmp_path / HIDDEN))
    config = load_config(path)
    monkeypatch.setenv("SOME_TOKEN", HIDDEN)  # after it, because a run file with a secret is refused
    (tmp_path / "other").mkdir()
    Tracker("wandb", config, tmp_path / "other", pytest.fail)
    assert HIDDEN not in json.dumps(wandb.inits[0]["config"])
    assert "[redacted]" in wandb.inits[0]["config"]["train"]["output_dir"]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_dropped_and_the_run_finishes(file, tmp_path, wandb, monkeypatch, call):
    monkeypatch.setenv("SOME_TOKEN", HIDDEN)
    calls = []

    def fail(*arguments, **keywords):
        calls.append(call)
        raise RuntimeError(f"no network for {HIDDEN}\nsecond line")

    monkeypatch.setattr(wandb, call, fail)
    said = run("sft", file("wandb"))
    assert said.code == 0, said.err
    lines = [line for line in said.out.splitlines() if "train.report_to" in line]
    assert lines == ["warning: train.report_to: wandb failed and gets no more lines: no network for [redacted]"]
    assert len(calls) == 1 and len(metrics(tmp_path / "run")) > 3


def test_a_failed_run_closes_its_trackers(file, tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), open_trackers(load_config(file("wandb")), tmp_path, pytest.fail):
        raise ZeroDivisionError
    assert wandb.finished == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line_before_any_work(file, tmp_path, monkeypatch, name):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else original(n, *a))
    said = run("sft", file(name))
    assert said.code == 2
    assert said.err == f'error: train.report_to: "{name}" is not installed: pip install "lowlevel[{name}]"\n'
    assert not (tmp_path / "run").exists()


def test_trackio_keeps_every_number_in_its_local_store(file, tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="no trackio here: pip install lowlevel[trackio]")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "store")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "store")
    assert run("sft", file("trackio")).code == 0
    name = (tmp_path / "run" / "tracker_id.txt").read_text().strip()
    logs = SQLiteStorage.get_logs("lowlevel", name)
    assert [(log["step"], log["loss"]) for log in logs if "loss" in log] == [
        (record["step"], record["loss"]) for record in metrics(tmp_path / "run") if "loss" in record
    ]
    assert SQLiteStorage.get_run_config("lowlevel", name)["train"]["max_steps"] == 3
