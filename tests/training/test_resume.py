"""A run that was stopped and resumed in a new process is the uninterrupted run, bit for bit.

The uninterrupted and the stopped runs happen here, all resumed ones in one other process (`resume_worker.py`), which
shares nothing with this one but the files. One run is stopped by a real SIGTERM to `python -m lowlevel`. Both processes
have another PYTHONHASHSEED, an ASCII locale and streams, the worker also a clock of 1970; the paths have spaces,
brackets and umlauts.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import helpers
import pytest
import tomli_w
from rich.console import Console
from safetensors.torch import load_file
from workspace import stop_at

from lowlevel.batch.order import ORDER_VERSION
from lowlevel.checkpoints.checkpoint import checkpoints, verify
from lowlevel.config.file import load_config
from lowlevel.errors import ConfigError, DataError, InterruptedRunError
from lowlevel.running.training import run_training

ROWS = 11  # batch 2 x accumulation 1: 6 steps an epoch, the last of one row; 2 x 3: 2 steps, of 6 and of 5 rows
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    **{"PYTHONHASHSEED": "12345", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "PYTHONPATH": str(Path(sys.modules["lowlevel"].__file__).parents[1]),
}


@dataclass(frozen=True)
class Case:
    """A kind of run, and the steps after which it is stopped, each time from the start."""

    method: str
    accumulation: int
    stops: tuple[int, ...]
    steps: int  # all of them
    train: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    dpo: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}-{self.accumulation}"


HOLDOUT = {"eval_source": "holdout", "eval_limit": 2}  # leaves 9 rows: 5 steps an epoch, or 2
CASES = (
    Case("sft", 1, stops=(12,), steps=18, train={"logging_steps": 1}),  # at the second epoch's end
    Case("sft", 3, stops=(3,), steps=6, train={"logging_steps": 2},  # with a half-full logging window
         lora={"use_rslora": True, "loraplus_lr_ratio": 4.0}),
    Case("dpo", 1, stops=(7,), steps=15, train={"logging_steps": 1, "eval_steps": 4}, data=HOLDOUT),
    Case("dpo", 3, stops=(2,), steps=6, train={"logging_steps": 1},
         dpo={"ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5}),
)  # fmt: skip
STOPPED = [(case, stop) for case in CASES for stop in case.stops]


def write_config(folder: Path, case: Case, workspace: dict, **train) -> Path:
    """A run file for `folder`."""
    data = {"source": str(workspace[case.method]), "max_length": 128, **case.data}
    tables = {
        "method": case.method,
        "model": {"name": str(workspace["base"])},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, **case.lora},
        "data": {**data, "format": "messages" if case.method == "sft" else "preference"},
        "train": {
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": case.accumulation,
            "learning_rate": 5e-3,
            "warmup_ratio": 0.2,
            "num_train_epochs": 3,
            **case.train,
            **train,
        },
    }
    if case.method == "dpo":
        tables["model"]["adapter"] = str(workspace["parent"])
        tables["dpo"] = {"disable_dropout": False, **case.dpo}
    path = folder.with_suffix(".toml")
    path.write_text(tomli_w.dumps(tables))
    return path


def run_and_stop(config: Path, step: int) -> InterruptedRunError:
    """Run until a signal arrives in step `step`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(InterruptedRunError) as caught:
            run_training(load_config(config), QUIET)
    return caught.value


def stop_by_sigterm(config: Path, folder: Path, lines: int) -> subprocess.CompletedProcess:
    """`python -m lowlevel sft`, with a SIGTERM once it has logged `lines` lines."""
    command = [sys.executable, "-m", "lowlevel", "sft", str(config), "--train.save_steps", "1"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            if (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= lines:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def workspace(tiny_base, parent_adapter, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("resume") / "a [red] ü folder"
    folder.mkdir()
    texts = [f"{'very ' * (i % 4)}short text number {i}" for i in range(ROWS)]
    chats = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t[::-1]}]} for t in texts]
    pairs = [{"prompt": t, "chosen": t[::-1], "rejected": "no " * (1 + i % 3)} for i, t in enumerate(texts)]
    return {
        "folder": folder,
        "base": tiny_base,
        "parent": parent_adapter,
        "sft": helpers.write_jsonl(folder / "zeilen ü.jsonl", chats),
        "dpo": helpers.write_jsonl(folder / "dpo.jsonl", pairs),
    }


@pytest.fixture(scope="module")
def outcome(workspace) -> dict:
    """All runs of this file: uninterrupted ones, stopped ones, and those resumed in another process."""
    folder = workspace["folder"]
    jobs, errors, status = [], {}, {}
    for case in CASES:
        run_training(load_config(write_config(folder / case.name, case, workspace)), QUIET)
        for stop in case.stops:
            name = f"{case.name}-at-{stop}"
            config = write_config(folder / name, case, workspace)
            errors[name] = run_and_stop(config, stop)
            status[name] = json.loads((folder / name / "run-status.json").read_text())
            jobs.append({"config": str(config), "resume": True})
    jobs.append({"config": str(write_config(folder / "again", CASES[0], workspace)), "resume": False})

    # the newest of three checkpoints has a flipped bit
    damaged = write_config(folder / "damaged", CASES[0], workspace, save_steps=1, save_total_limit=3)
    run_and_stop(damaged, 4)
    file = folder / "damaged" / "step-00000004" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    jobs.append({"config": str(damaged), "resume": True})

    printed, again = in_another_process(folder, jobs)
    return {"folder": folder, "errors": errors, "status": status, "printed": printed, "again": again}


def in_another_process(folder: Path, jobs: list[dict]) -> tuple[dict[str, str], bytes]:
    """What each run said, and what went to the process's standard output."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("resume_worker.py")), "jobs.json", "printed.json"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads((folder / "printed.json").read_text())
    return {Path(job["config"]).stem: text for job, text in zip(jobs, said, strict=True)}, done.stdout


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict]:
    """Logged lines, without what a clock or an allocator says."""
    free = ("tokens_per_second", "peak_allocated_gib", "peak_reserved_gib")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a line may be in the making
    return [{key: value for key, value in record.items() if key not in free} for record in records]


def assert_same_run(run: Path, expected: Path, steps: int) -> None:
    last = f"step-{steps:08d}"
    assert metrics(run) == metrics(expected)
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json",
                 f"{last}/adapter_model.safetensors", f"{last}/optimizer.safetensors"):  # fmt: skip
        assert sha256(run / file) == sha256(expected / file), file
    names = [{path.name for path in (folder / last).iterdir()} for folder in (run, expected)]
    assert names[0] == names[1]
    if "reference.safetensors" in names[0]:
        assert sha256(run / last / "reference.safetensors") == sha256(expected / last / "reference.safetensors")
    states = [verify(folder / last)["state"] for folder in (run, expected)]
    for state in states:
        assert state.pop("seconds") > 0
    assert states[0] == states[1]


@pytest.mark.parametrize(("case", "stop"), STOPPED, ids=[f"{case.name}-at-{stop}" for case, stop in STOPPED])
def test_a_resumed_run_is_the_uninterrupted_run(outcome, case, stop):
    name = f"{case.name}-at-{stop}"
    assert f"resumed from step-{stop:08d}" in outcome["printed"][name]
    assert_same_run(outcome["folder"] / name, outcome["folder"] / case.name, case.steps)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_runs_learned_and_dropout_was_on(outcome, case, workspace):
    """Or there would be little to compare: the loss falls, weights move, and every step is logged as configured."""
    run = outcome["folder"] / case.name
    logged = [record for record in metrics(run) if "loss" in record]
    assert [r["step"] for r in logged] == list(
        range(case.train["logging_steps"], case.steps + 1, case.train["logging_steps"])
    )
    assert logged[-1]["loss"] < logged[0]["loss"] - (0.1 if case.method == "sft" else 0.02)
    assert len({r["grad_norm"] for r in logged}) == len(logged)
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(t.abs().max() > 1e-4 for name, t in final.items() if "lora_B" in name)
    if case.method == "dpo":
        parent = "parent/adapter_model.safetensors"
        assert sha256(run / parent) == sha256(workspace["parent"] / "adapter_model.safetensors")
    if case.data:
        assert [r["step"] for r in metrics(run) if "eval_loss" in r] == [0, 4, 8, 12, 15]


def test_a_stopped_run_says_so_and_how_to_go_on(outcome):
    for case, stop in STOPPED:
        error = outcome["errors"][f"{case.name}-at-{stop}"]
        assert error.exit_code == 143
        assert str(error) == f"stopped at step {stop} of {case.steps} and saved; continue with --resume"
        status = outcome["status"][f"{case.name}-at-{stop}"]
        assert (status["state"], status["exit"], status["step"]) == ("stopped", 143, stop)
        assert status["checkpoint"] == f"step-{stop:08d}"


def test_running_again_gives_the_same_run(outcome):
    assert b"[red]" in outcome["again"].splitlines()[-1]
    assert_same_run(outcome["folder"] / "again", outcome["folder"] / CASES[0].name, CASES[0].steps)


def test_a_damaged_checkpoint_is_skipped_with_a_message(outcome):
    printed = outcome["printed"]["damaged"]
    assert "skipped a damaged checkpoint" in printed and "step-00000004/optimizer.safetensors" in printed
    assert "resumed from step-00000003" in printed
    assert_same_run(outcome["folder"] / "damaged", outcome["folder"] / CASES[0].name, CASES[0].steps)


@pytest.mark.slow  # two processes that import torch; tests/faults has the signals, in processes that are forked
def test_a_real_sigterm_saves_and_the_run_goes_on(outcome, workspace):
    before = outcome["folder"] / "killed"
    config = write_config(before, CASES[0], workspace)
    process = stop_by_sigterm(config, before, lines=2)
    assert process.returncode == 143, process.stderr
    status = json.loads((before / "run-status.json").read_text())
    assert (status["state"], status["exit"]) == ("stopped", 143)
    newest = checkpoints(before)[0]
    step = int(newest.name.removeprefix("step-"))
    assert 2 <= step < CASES[0].steps and verify(newest)["state"]["step"] == step
    said = process.stderr.strip().splitlines()
    assert said[0] == "stopping when this step is saved; a second signal ends the process at once"
    assert said[1].startswith(f"stopped at step {step} of {CASES[0].steps} and saved")
    assert not [path for path in before.iterdir() if path.name.startswith(".")]
    printed, _ = in_another_process(outcome["folder"], [{"config": str(config), "resume": True}])
    assert f"resumed from step-{step:08d}" in printed["killed"]
    assert_same_run(outcome["folder"] / "killed", outcome["folder"] / CASES[0].name, CASES[0].steps)


def test_resuming_a_finished_run_changes_nothing(outcome, workspace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(outcome["folder"] / CASES[1].name, run)
    run_training(load_config(write_config(run, CASES[1], workspace)), QUIET, resume=True)
    assert_same_run(run, outcome["folder"] / CASES[1].name, CASES[1].steps)


def test_resuming_before_the_first_checkpoint_starts_over(outcome, workspace, tmp_path):
    """As after a SIGKILL: lines of the lost steps must not stay beside those of the same steps taken again."""
    run = tmp_path / "run"
    config = write_config(run, CASES[3], workspace)
    run_and_stop(config, 2)
    shutil.rmtree(run / "step-00000002")
    run_training(load_config(config), QUIET, resume=True)
    assert_same_run(run, outcome["folder"] / CASES[3].name, CASES[3].steps)


def test_a_torn_last_line_of_the_metrics_does_not_stop_a_resume(outcome, workspace, tmp_path):
    """As a power cut leaves it; the line belongs to a step that is taken again, or is the only thing lost."""
    run = tmp_path / "run"
    config = write_config(run, CASES[3], workspace)
    run_and_stop(config, 2)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    run_training(load_config(config), QUIET, resume=True)
    assert_same_run(run, outcome["folder"] / CASES[3].name, CASES[3].steps)


def test_a_checkpoint_names_the_order_that_it_was_made_with(outcome):
    """So that a later version with another ORDER_VERSION refuses to resume it."""
    payload = verify(checkpoints(outcome["folder"] / CASES[0].name)[0])
    assert payload["identity"]["order_version"] == ORDER_VERSION


def test_other_data_weights_or_parents_are_refused(outcome, workspace, tmp_path):
    """The same settings over files that changed meanwhile."""
    run = tmp_path / "run"
    shutil.copytree(outcome["folder"] / CASES[3].name, run)
    shutil.copytree(workspace["parent"], tmp_path / "parent")
    rows = workspace["dpo"].read_text()
    (tmp_path / "dpo.jsonl").write_text(rows)
    places = {**workspace, "parent": tmp_path / "parent", "dpo": tmp_path / "dpo.jsonl"}
    config = write_config(run, CASES[3], places)
    shutil.copy(config, run / "config.toml")  # as if it had always named these files

    def refused(kind, what):
        with pytest.raises(kind, match=what):
            run_training(load_config(config), QUIET, resume=True)

    run_training(load_config(config), QUIET, resume=True)
    (tmp_path / "dpo.jsonl").write_text(rows.replace("number 3", "number 4", 1))
    refused(DataError, r"cannot resume: train rows differ: row 3 differs \(dpo.jsonl:4\)$")
    (tmp_path / "dpo.jsonl").write_text(rows)
    helpers.save_random_adapter(workspace["base"], tmp_path / "parent", seed=6)
    refused(ConfigError, r"\n  parent_adapter: '\w{64}' \(checkpoint\) != '\w{64}' \(now\)$")


def test_a_restart_discards_the_run_and_nothing_else(outcome, workspace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(outcome["folder"] / CASES[1].name, run)
    config = write_config(run, CASES[1], workspace)
    (run / "notes.d").mkdir()
    run_training(load_config(config), QUIET, restart=True)
    assert_same_run(run, outcome["folder"] / CASES[1].name, CASES[1].steps)
    assert (run / "notes.d").exists()
