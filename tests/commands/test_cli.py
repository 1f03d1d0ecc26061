"""The command line: help answers at once; each kind of mistake has one line and one exit code; nothing half-written."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from refusals import refused

import lowlevel
import lowlevel.commands.data
import lowlevel.running.training
from lowlevel.cli import build_parser, main
from lowlevel.config import METHODS
from lowlevel.config.schema import SECTIONS
from lowlevel.errors import InterruptedRunError

COMMANDS = (
    "demo",
    "doctor",
    "sft",
    "dpo",
    "kto",
    "reward",
    "grpo",
    "rloo",
    "ppo",
    "online_dpo",
    "data",
    "losses",
    "plan",
    "time",
    "memory",
    "merge",
    "export",
    "generate",
    "annotate",
    "score",
    "compare",
    "eval",
    "judge",
    "inspect",
    "verify",
    "report",
    "replay",
)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(lowlevel.__file__).parents[1]),
}
# With what it imports: libraries that take seconds must not be among them.
HELP = """
import sys
from lowlevel.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy", "rich", "accelerate", "matplotlib"}
    print("imported:", sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
# A run of its own process. torch's compiler is for runs that compile, the others for data of the hub and trackers.
RUN = """
import gc, sys
from lowlevel.cli import main
try:
    main()
finally:
    unused = {"torch._inductor.compile_fx", "datasets", "pandas", "scipy", "sklearn", "tensorboard", "trackio", "wandb"}
    print("imported:", sorted(unused & set(sys.modules)), "full collections:", gc.get_stats()[2]["collections"])
"""


def process(*arguments: object, timeout: float = 100) -> subprocess.CompletedProcess:
    words = [str(argument) for argument in arguments]
    return subprocess.run([sys.executable, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


# Help


def test_help_names_the_commands_and_the_exit_codes(cli):
    said = cli("--help")
    assert (said.code, said.err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\b", said.out, re.MULTILINE)
    for code in ("2 usage or configuration", "3 data", "4 checkpoint, model or disk"):
        assert code in " ".join(said.out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(cli, command):
    said = cli(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert "--debug" in said.out
    others = {*METHODS} - {command} if command in METHODS else set()
    keys = {f"--{section}.{key}" for section in SECTIONS.keys() - others for key in SECTIONS[section].model_fields}
    named = set(re.findall(r"--[a-z_]+\.\w+", said.out))
    assert named == (keys if command in (*METHODS, "data", "plan", "time", "verify") else set())


def test_every_key_has_its_description_and_default_in_the_help(cli):
    out = cli("data", "--help").out
    for section, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            (line,) = re.findall(rf"^  --{section}\.{key} +(.*)$", out, re.MULTILINE)
            assert field.description in line
            default = str(field.default).lower() if isinstance(field.default, bool) else field.default
            default = ",".join(default) if isinstance(default, tuple) else default
            assert (f"(default: {default}" in line) == (default not in (None, "", {}))
    assert (
        "peak learning rate (default: 0.0002; for dpo: 1e-05; for kto: 1e-05; for reward: 0.0001; for grpo: 1e-05"
        in out
    )
    assert "peak learning rate (default: 0.0002)\n" in cli("sft", "--help").out
    assert "peak learning rate (default: 1e-05)\n" in cli("dpo", "--help").out


def test_help_imports_nothing_heavy_and_answers_at_once():
    before = os.times()
    done = process("-c", HELP, "--help")
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stderr
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.5, "seconds of computing, which a busy machine does not change much"
    assert "imported: []" in process("-c", HELP, "sft", "--help").stderr
    assert "imported: []" in process("-c", HELP, "sft", "--train.seed", "x").stderr  # a typo answers at once, too


def test_the_version(cli):
    done = process("-m", "lowlevel", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, lowlevel.__version__)
    assert cli("--version").out.strip() == lowlevel.__version__


def test_the_console_script_is_the_same_function():
    (script,) = entry_points(group="console_scripts", name="lowlevel")
    assert script.load() is main


def test_a_process_ends_at_once_after_its_command(monkeypatch, capsys):
    """Neither Python's last collection of garbage takes a second, nor does Ctrl-C print a traceback meanwhile."""
    monkeypatch.setattr(sys, "argv", ["lowlevel", "--version"])
    before, threshold = signal.getsignal(signal.SIGINT), gc.get_threshold()
    gc.unfreeze()  # what other packages froze
    try:
        with pytest.raises(SystemExit):
            main()
        assert gc.get_freeze_count() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), InterruptedRunError("interrupted", signal.SIGINT)])
def test_of_several_processes_that_are_stopped_the_first_says_so(cli, monkeypatch, first, error):
    def run(options, overrides):
        raise error

    monkeypatch.setattr("lowlevel.cli.FIRST", first)
    monkeypatch.setattr("lowlevel.commands.doctor.run", run)
    said = cli("doctor")
    assert (said.code, said.err) == (130, "interrupted\n" * first)


def test_the_commands_are_those_of_the_list_above():
    (actions,) = [action for action in build_parser()._actions if action.dest == "command"]
    assert tuple(actions.choices) == COMMANDS


# Where flags stand


@pytest.mark.parametrize(
    "words",
    [
        ("RUN", "--train.seed", "7", "--data.packing=false"),
        ("--train.seed", "7", "RUN", "--data.packing", "false"),
        ("--train.seed=7", "--data.packing", "false", "RUN"),
        ("--on-bad-row", "skip", "--train.seed", "7", "--data.packing", "false", "RUN"),
    ],
)
def test_flags_may_stand_before_and_after_the_run_file(cli, space, tmp_path, monkeypatch, words):
    seen = []
    monkeypatch.setattr(lowlevel.commands.data, "show_data", lambda config, console: seen.append(config))
    config = space.write("run", "sft", folder=tmp_path)
    said = cli("data", *(config if word == "RUN" else word for word in words))
    assert (said.code, said.err) == (0, "")
    assert (seen[0].train.seed, seen[0].data.packing, seen[0].train.max_steps) == (7, False, 6)
    assert seen[0].data.on_bad_row == ("skip" if "skip" in words else "error")


def test_flags_alone_make_a_run(cli, tmp_path):
    """Without a run file the flags are not taken for one."""
    source = ("--data.source", tmp_path / "x.jsonl")
    refused(cli("sft", "--data.max_length", 128, *source), 2, "x.jsonl: no such file")
    refused(cli("sft", "--train.seed", -1), 2, "train.seed", "got -1")


# 2: usage and configuration


def test_usage(cli, space, tmp_path):
    config = space.write("run", "sft", folder=tmp_path)
    refused(cli("sft", config, "--unknown"), 2, "'--unknown'")
    refused(cli("sft", config, "more"), 2, "'more'")
    refused(cli("sft", config, "--train.seed"), 2, "--train.seed needs a value")
    refused(cli("merge", tmp_path, "--out", tmp_path / "o", "--train.seed", 1), 2, "--train.seed")
    refused(cli("demo", "--train.seed=1"), 2, "--train.seed")
    refused(cli("stf", config), 2, 'unknown command "stf"; did you mean "sft"?')
    refused(cli("no-such-command"), 2, "lowlevel --help")
    assert cli().code == 2
    refused(cli("sft", config, "--res"), 2, "'--res'")
    refused(cli("merge", "x"), 2, "the following arguments are required: --out; lowlevel merge --help explains")
    refused(cli("merge", "x", "--into", "y", "--out", "z"), 2, "argument --into: invalid choice: 'y'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "x", "--prompt", "a", "--max-new-tokens", 0),
        ("generate", "x", "--prompt", "a", "--temperature", -1),
        ("generate", "x", "--prompt", "a", "--temperature", "nan"),
        ("compare", "x", "--prompts", 0),
        ("compare", "x", "--max-new-tokens", -5),
    ],
)
def test_numbers_out_of_range(cli, words):
    said = cli(*words)
    assert said.code == 2
    assert f"argument {words[-2]}: expected a" in said.err and repr(str(words[-1])) in said.err


def test_configuration(cli, space, tmp_path):
    config = space.write("run", "sft", folder=tmp_path)
    refused(cli("sft", tmp_path / "none.toml"), 2, "none.toml: no such run file")
    refused(cli("sft", config, "--model.name", "./no/model"), 2, "'./no/model': no such folder")
    wrong = 'unknown key "train.learning_rat"; did you mean "train.learning_rate"?'
    refused(cli("sft", config, "--train.learning_rat", "1e-4"), 2, wrong)
    refused(cli("sft", config, "--trian.seed", 1), 2, 'unknown key "trian"; did you mean "train"?')
    refused(cli("sft", config, "--train.learning_rate", "abc"), 2, "train.learning_rate: expected a number, got 'abc'")
    refused(cli("dpo", config), 2, 'method = "sft", but the command is "dpo"')
    refused(cli("sft", config, "--data.eval_limit", 3), 2, "data.eval_limit needs data.eval_source")
    refused(cli("sft", config, "--train.seed", "x", "--lora.r", 0), 2, "train.seed", "lora.r", lines=2)
    refused(cli("sft", config, "--data.max_length", 400), 2, "data.max_length 400 > model limit 256")
    refused(cli("sft", config, "--data.source", tmp_path / "none.jsonl"), 2, "none.jsonl: no such file")
    refused(cli("sft", config, "--model.name", tmp_path / "none"), 2, "model.name")
    refused(cli("sft", config, "--train.precision", "fp16"), 2, "needs a GPU")
    refused(cli("sft", config, "--resume", "--restart"), 2, "give one of them")
    refused(cli("sft", config, "--lora.init_from", tmp_path / "none"), 2, "lora.r comes from lora.init_from", lines=2)
    refused(cli("sft", config, "--lora.target_modules", "qproj"), 2, '"qproj" matches no layer', "q_proj", "down_proj")
    refused(cli("sft", config, "--lora.target_modules", "lm_head"), 2, '"lm_head" matches no layer')
    config = space.write("run", "sft", folder=tmp_path, lora={"r": None, "lora_alpha": None})
    refused(cli("sft", config, "--lora.init_from", tmp_path / "none"), 2, "lora.init_from: ", "none does not exist")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_configuration_of_dpo(cli, runs, tmp_path):
    config = runs.space.write("run", "dpo", folder=tmp_path, model={"adapter": str(runs.sft)})
    refused(cli("dpo", config, "--model.adapter", tmp_path / "none"), 2, "model.adapter", "does not exist")
    refused(
        cli("dpo", config, "--model.adapter", runs.dpo), 2, f"frozen adapter: give {runs.dpo / 'stacked'}, which is"
    )
    refused(cli("dpo", config, "--dpo.loss_type", "sigmod"), 2, "[dpo]", "sigmod", "sigmoid")
    refused(cli("dpo", config, "--dpo.rpo_alpha", 1.0), 2, "[dpo]", "rpo_alpha")
    (tmp_path / "empty").mkdir()
    refused(
        cli("dpo", config, "--model.adapter", tmp_path / "empty"),
        2,
        "holds no adapter; no adapter_config.json is in it",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run.toml"]


def test_a_folder_that_holds_a_run_is_left_alone(cli, runs):
    before = {path: path.stat().st_mtime_ns for path in runs.sft.rglob("*")}
    said = cli("sft", runs.space.folder / "sft.toml")
    refused(said, 2, "holds a run: add --resume", "--restart", "train.output_dir")
    assert {path: path.stat().st_mtime_ns for path in runs.sft.rglob("*")} == before


# 3: data


@pytest.mark.parametrize("command", ["sft", "data"])
def test_bad_rows(cli, space, tmp_path, command):
    good = space.sft_rows.read_text().splitlines()
    reply = '{"role": "assistant", "content": "b"}'
    bad = [
        "{",
        '{"messages": []}',
        f'{{"messages": [{{"role": "usr", "content": "a"}}, {reply}]}}',
        f'{{"messages": [{{"role": "user", "content": null}}, {reply}]}}',
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([*good, *bad]) + "\n")
    config = space.write("run", "sft", folder=tmp_path, data={"source": str(rows)}, train={"max_steps": 1})
    said = cli(command, config)
    refused(said, 3, *(f"rows.jsonl:{25 + i}: " for i in range(4)), 'role "usr"', lines=4)
    assert said.out == ""
    assert not (tmp_path / "run").exists()
    said = cli(command, config, "--on-bad-row", "skip")
    assert said.code == 0, said.err
    if command == "sft":
        report = json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]
        assert (report["rows_read"], report["rows_kept"]) == (28, 24)
        assert sum(reason["count"] for reason in report["dropped"].values()) == 4


def test_data_that_is_of_another_kind(cli, space, tmp_path):
    config = space.write("run", "dpo", folder=tmp_path, data={"source": str(space.sft_rows)})
    refused(cli("dpo", config), 3, "they fit SFT (messages)")
    (tmp_path / "empty.jsonl").write_text("")
    refused(cli("dpo", config, "--data.source", tmp_path / "empty.jsonl"), 3, "empty.jsonl has no rows")
    assert not (tmp_path / "run").exists()


# --debug, and a process of its own


def test_debug_shows_where(tmp_path):
    one, debug = (process("-m", "lowlevel", "sft", tmp_path / "none.toml", *more) for more in ((), ("--debug",)))
    assert (one.returncode, one.stdout, one.stderr.count("\n")) == (2, "", 1)
    assert one.stderr.startswith("error: ")
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr
    assert "none.toml: no such run file" in debug.stderr


def test_an_error_that_nobody_foresaw_is_one_line_too(cli, space, tmp_path, monkeypatch):
    def fail(config, console):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(lowlevel.commands.data, "show_data", fail)
    config = space.write("run", "sft", folder=tmp_path)
    refused(cli("data", config), 1, "ZeroDivisionError: by zero (--debug shows where)")
    debug = cli("data", config, "--debug")
    assert debug.code == 1
    assert debug.err.startswith("Traceback")
    assert debug.err.endswith("error: ZeroDivisionError: by zero\n")


def test_a_run_in_its_own_process_says_only_what_it_should(space, tmp_path):
    """No progress bars, warnings or advice of libraries; standard output is plain lines. Little is imported."""
    config = space.write("run", "sft", folder=tmp_path, train={"max_steps": 2, "logging_steps": 1})
    done = process("-c", RUN, "sft", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: [] full collections: 0"
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == ["1/2", "2/2"]


def test_as_t4_sets_what_a_t4_has(cli, space, monkeypatch, tmp_path):
    config = space.write("run", "sft", folder=tmp_path)
    said = cli("sft", config, "--as-t4")
    assert (said.code, said.err) == (
        2,
        'error: train.precision = "fp16" needs a GPU, and none is visible: use --train.precision fp32\n',
    )
    said = cli("sft", config, "--as-t4", "--train.precision", "fp32")
    assert said.code == 2 and "--as-t4 sets train.precision and model.attn_implementation" in said.err
    seen = {}
    monkeypatch.setattr("lowlevel.running.training.run_training", lambda config, *_, **__: seen.update(config=config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=60 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, own: seen.update(share=share))
    assert cli("sft", config, "--as-t4").code == 0
    assert (seen["config"].train.precision, seen["config"].model.attn_implementation) == ("fp16", "efficient")
    assert seen["share"] == 0.25
