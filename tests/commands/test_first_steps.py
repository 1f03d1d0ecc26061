"""What a newcomer types first: defaults alone, a folder with things of one's own, output piped to `head`."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import run

import lowlevel
from lowlevel.cli import main
from lowlevel.commands.demo import demo_configs
from lowlevel.config.file import config_from_tables
from lowlevel.running.run_folder import RunFolder

SHORT = ("--train.max_steps", "1", "--train.per_device_train_batch_size", "1", "--data.limit", "4", "--lora.r", "2",
         "--train.gradient_accumulation_steps", "1")  # fmt: skip


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_all_defaults_together_run(cli, tmp_path, method):
    said = cli(method, "--train.output_dir", tmp_path / "run", *SHORT)
    assert said.code == 0, said.err
    config = RunFolder(tmp_path / "run").read_config()
    assert (config.data.format, config.data.max_length) == ("auto", 256)
    assert cli("data", "--data.limit", "4").code == 0
    said = cli(method, "--train.output_dir", tmp_path / "none", "--data.source", tmp_path / "none.jsonl")
    assert said.code == 2 and "no such file" in said.err and "max_length" not in said.err


def test_what_is_given_goes_before_defaults():
    tables = {"method": "dpo", "model": {"name": "demo"}, "data": {"format": "orca", "max_length": 64}}
    config = config_from_tables(tables, "x")
    assert (config.data.format, config.data.max_length) == ("orca", 64)
    other = config_from_tables({"model": {"name": "some/base"}}, "x")
    assert (other.data.format, other.data.max_length) == ("auto", 512)


def test_restart_removes_what_runs_wrote_and_nothing_else(runs, cli, tmp_path):
    config = runs.space.write("kept", "sft", folder=tmp_path, train={"max_steps": 1})
    folder = tmp_path / "kept"
    mine = {"thesis.txt": "a", "page.html": "<p>mine</p>", "notes/more.txt": "b"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert cli("sft", config, "--restart").code == 0, "a folder without a run"
    assert cli("inspect", folder, "--example", 1, "--html", folder / "step.html").code == 0
    assert cli("verify", folder).code == 0
    made = {path.name for path in folder.iterdir()} - {"thesis.txt", "page.html", "notes", "run.lock"}
    RunFolder(folder).discard()
    assert {path.name for path in folder.iterdir()} == {"thesis.txt", "page.html", "notes", "run.lock"}, made
    assert all((folder / name).read_text() == text for name, text in mine.items())


def test_a_demo_is_neither_discarded_nor_gone_on_with_unasked(cli, tmp_path):
    config = demo_configs(tmp_path)[0]
    Path(config.train.output_dir).mkdir()
    (Path(config.train.output_dir) / "run-status.json").write_text(json.dumps({"state": "stopped"}))
    said = cli("demo", "--out", tmp_path)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert f"{tmp_path} holds a demo: add --resume to continue, --restart" in said.err
    assert cli("demo", "--out", tmp_path, "--resume", "--restart").code == 2


def test_verify_takes_the_keys_of_a_run_file(runs, cli, tmp_path):
    config = runs.space.write("gpu", "sft", folder=tmp_path, train={"precision": "fp16"})
    said = cli("verify", config)
    assert said.code == 2 and "use --train.precision fp32" in said.err
    said = cli("verify", config, "--train.precision", "fp32")
    assert said.code == 0, said.err
    said = cli("verify", runs.sft, "--train.precision", "fp32")
    assert said.code == 2 and "config.toml; flags are for the start of a run" in said.err


def test_help_names_the_choices(cli):
    said = run("sft", "--help")
    for choices in ("auto | messages | sharegpt", "assistant | all", "paged_adamw_32bit"):
        assert choices in said.out


def test_a_reader_that_leaves_ends_a_run_with_130(tmp_path, monkeypatch):
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            if "step 1/" in text:
                raise BrokenPipeError
            return len(text)

    replaced = []
    monkeypatch.setattr(sys, "stdout", Left())
    monkeypatch.setattr(os, "dup2", lambda _, descriptor: replaced.append(descriptor))
    flags = ("--train.max_steps", "3", "--train.logging_steps", "1", "--train.output_dir", str(tmp_path / "run"))
    assert main(["sft", *SHORT, *flags]) == 130
    assert replaced == [1], "or Python prints an error at its last flush"
    status = json.loads((tmp_path / "run" / "run-status.json").read_text())
    assert (status["exit"], status["error"]) == (130, "standard output was closed")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "losses"])
def test_a_reader_that_leaves_ends_a_command_with_130(tmp_path, command):
    environment = {**os.environ, "PYTHONPATH": str(Path(lowlevel.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    flags = [*SHORT, "--train.max_steps", "40", "--train.logging_steps", "1"] if command == "sft" else []
    process = subprocess.Popen([sys.executable, "-m", "lowlevel", command, *flags], cwd=tmp_path, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 130
    assert process.stderr.read() == ""
