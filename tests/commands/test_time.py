"""`lowlevel time`: what it says of a run, that it leaves nothing behind, and how it ends."""

import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import step_result
from refusals import refused
from rich.console import Console

import lowlevel.running.job as job
import lowlevel.timing.report as command
from lowlevel.batch.layout import PackedBatch
from lowlevel.cli import build_parser
from lowlevel.config.file import load_config
from lowlevel.timing import phases
from lowlevel.timing.phases import OTHER
from lowlevel.timing.steps import Step


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def rows(out: str) -> dict[str, list[str]]:
    """Cells of the table of phases, by the first."""
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 3}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run(cli, runs, tmp_path, elsewhere, method):
    more = {"model": {"adapter": str(runs.sft)}} if method == "dpo" else {}
    config = runs.space.write("run", method, folder=tmp_path, **more)
    said = cli("time", config, "--steps", 4, "--json", tmp_path / "time.json")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"{method}: {runs.space.base}, 4-bit nf4 base, fp32 on CPU\n")
    assert "whole steps, eager: 4 of 4, after 3 warm-up steps" in said.out
    assert "a step by phase, eager: means of 4 steps" in said.out
    assert ("shared prompt" in said.out) == ("reference pass" in said.out) == (method == "dpo")
    assert "graph" not in said.out and "GiB" not in said.out
    shown = rows(said.out)
    absent = {phases.BASELINE} | ({phases.REFERENCE} if method == "sft" else set())
    names = [name for name in phases.PHASES if name not in absent]
    assert list(shown) == [*names, "the whole step"]
    shares = [float(share.rstrip("%")) for _, share in shown.values()]
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.5) and shares[-1] == 100
    milliseconds = [float(one.replace(",", "")) for one, _ in shown.values()]
    assert sum(milliseconds[:-1]) == pytest.approx(milliseconds[-1], abs=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run.toml", "time.json"]
    assert list(elsewhere.iterdir()) == []


def test_the_json_holds_every_step_and_what_was_printed(cli, space, tmp_path):
    config = space.write("run", "sft", folder=tmp_path)
    said = cli("time", config, "--steps", 3, "--json", tmp_path / "time.json")
    written = json.loads((tmp_path / "time.json").read_text())
    assert [written[key] for key in ("method", "device", "precision", "mode")] == ["sft", "cpu", "fp32", "eager"]
    assert [step["step"] for step in written["steps"]["whole"]] == [4, 5, 6] and written["warm_up_steps"] == 3
    times = [step["ms"] for step in written["steps"]["whole"]]
    assert written["whole"]["median_ms"] == pytest.approx(sorted(times)[1])
    tokens = sum(step["tokens"] for step in written["steps"]["whole"])
    assert written["whole"]["tokens_per_second"] == pytest.approx(1e3 * tokens / sum(times))
    assert f"{written['whole']['median_ms']:,.1f}" in said.out
    assert f"{written['phases'][phases.BACKWARD]:,.2f}" in said.out
    for step in written["steps"]["divided"]:
        assert sum(step["phases_ms"].values()) == pytest.approx(step["ms"])
    means = sum(step["ms"] for step in written["steps"]["divided"]) / 3
    assert sum(written["phases"].values()) == pytest.approx(means)


def test_flags_go_over_the_run_file_and_alone(cli, space, tmp_path, elsewhere):
    """Rows and settings are the run's, and so are the tokens of a step."""
    config = space.write("run", "sft", folder=tmp_path)
    found = []
    for words in ((config,), (config, "--train.gradient_accumulation_steps", 1)):
        assert cli("time", *words, "--steps", 1, "--json", "t.json").code == 0
        (step,) = json.loads((elsewhere / "t.json").read_text())["steps"]["whole"]
        found.append(step["tokens"])
    assert 0 < found[1] < found[0]
    flags = ("--model.name", space.base, "--data.source", space.sft_rows, "--data.max_length", 128, "--lora.r", 4)
    said = cli("time", *flags, "--steps", 1)
    assert said.code == 0 and "3 steps of 2 x 4" in said.out


def test_a_reference_cache_is_left_alone(cli, space, tmp_path):
    config = space.write("run", "dpo", folder=tmp_path, dpo={"reference_cache": str(tmp_path / "cache")})
    said = cli("time", config, "--steps", 1)
    assert said.code == 0 and "dpo.reference_cache is left out" in said.out and "reference pass" in said.out
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_an_adapter_that_is_merged_first_leaves_no_base(cli, runs, tmp_path, elsewhere):
    model = {"adapter": str(runs.sft), "adapter_mode": "original"}
    config = runs.space.write("run", "dpo", folder=tmp_path, model=model)
    assert cli("time", config, "--steps", 1).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run.toml"]
    assert list(elsewhere.iterdir()) == []


# How it ends


def test_usage_and_errors_are_those_of_other_commands(cli, space, tmp_path):
    config = space.write("run", "sft", folder=tmp_path)
    assert cli("time", config, "--steps", 0).code == 2
    refused(cli("time", tmp_path / "none.toml"), 2, "none.toml: no such run file")
    refused(cli("time", config, "--json", tmp_path / "none" / "t.json"), 2, "--json", "no such folder")
    refused(cli("time", config, "--train.learning_rat", 1), 2, 'unknown key "train.learning_rat"')
    said = cli("time", config, "--train.execution", "graphed")
    refused(said, 2, "needs a GPU")
    assert said.out == ""  # and no model was loaded
    refused(cli("time", config, "--train.memory_budget", "1GiB"), 2, "is for a GPU")
    refused(cli("time", config, "--data.source", space.dpo_rows), 3)
    (tmp_path / "bad.jsonl").write_text("{\n")
    refused(cli("time", config, "--data.source", tmp_path / "bad.jsonl"), 3, "bad.jsonl:1")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in space.base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"no weights")
    refused(cli("time", config, "--model.name", broken), 4, "broken")
    assert not (tmp_path / "run").exists()


def test_the_help_says_how_many_steps_are_not_counted(cli):
    help_text = " ".join(cli("time", "--help").out.split())
    assert f"steps to measure, after {command.WARM_UP} more (default: 10)" in help_text
    assert build_parser().parse_args(["time"]).steps == 10


# On a GPU


def step(seconds, *, set_up=False, repeated=False, **parts) -> Step:
    result = step_result({"loss": 1.0}, 50, tokens=100, supervised=50, positions=128)
    return Step(parts or {OTHER: seconds}, result, set_up, repeated)


@pytest.fixture
def on_gpu(monkeypatch, space, tmp_path):
    """`time_run` of a run that says it is on a GPU and captures graphs: the calls that it makes, and what it prints."""
    calls = []

    class Execution:
        def __init__(self, policy, method, mode, note):
            self.mode = mode
            calls.append(("mode", mode))

        def use(self, mode):
            self.mode = mode
            calls.append(("mode", mode))

    def take_steps(run, execution, count, *, divide=False):
        calls.append(("steps", execution.mode, count, divide))
        if divide:
            return [step(0, **{phases.BACKWARD: 0.3, OTHER: 0.1}, set_up=i == 4) for i in range(count)]
        special = {4: {"set_up": True}, 5: {"repeated": True}}
        return [step(2.0 if i in special else 0.1, **special.get(i, {})) for i in range(count)]

    build = job.build_run_policy

    def build_policy(config, inputs):
        policy = build(config, inputs)
        object.__setattr__(policy, "placement", SimpleNamespace(device=torch.device("cuda"), precision="fp16"))
        return policy

    monkeypatch.setattr(job, "build_run_policy", build_policy)
    monkeypatch.setattr(command, "announce", lambda *_: None)
    monkeypatch.setattr(command, "choose_execution", lambda *_: "graphed")
    monkeypatch.setattr(command, "WithFallback", Execution)
    monkeypatch.setattr(command, "take_steps", take_steps)
    monkeypatch.setattr(command, "rehearse", lambda *a: calls.append(("rehearsal", isinstance(a[4], PackedBatch))))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(("memory freed",)))
    monkeypatch.setattr(command, "peak_memory", lambda: {"peak_allocated_gib": 1.234, "peak_reserved_gib": 2.5})
    config = load_config(space.write("run", "sft", folder=tmp_path))

    def time_run(steps=6):
        out = io.StringIO()
        timed = command.time_run(config, Console(file=out, width=140), steps=steps)
        return timed, calls, out.getvalue()

    return time_run


def test_graphs_are_timed_whole_and_their_compiled_layers_divided(on_gpu):
    timed, calls, out = on_gpu()
    assert calls == [
        ("mode", "graphed"),
        ("rehearsal", True),
        ("steps", "graphed", 9, False),
        ("mode", "compiled"),
        ("memory freed",),
        ("steps", "compiled", 9, True),
    ]
    assert (timed.mode, timed.divided_mode, timed.divided_steps) == ("graphed", "compiled", 5)
    assert "whole steps, graphed: 4 of 6, after 3" in out and "a step by phase, compiled: means of 5 steps" in out
    assert command.NOT_DIVIDED in out and "peak 1.23 GiB allocated, 2.50 GiB reserved" in out


def test_steps_that_do_not_count_are_shown_apart(on_gpu):
    timed, _, out = on_gpu()
    assert timed.whole.median_ms == pytest.approx(100) and timed.whole.tokens_per_second == pytest.approx(1000)
    assert re.search("1 that captured or compiled a new batch shape, median 2,000.0 ms", out)
    assert re.search("1 that overflowed in fp16 .* median 2,000.0 ms", out)


def test_warm_up_steps_are_neither(on_gpu):
    """Steps 0 to 2 of 3 + 1: the only one left is the first after them."""
    timed, calls, out = on_gpu(1)
    assert timed.whole.counted == 1 and timed.whole.set_up.count == 0 and "not counted" not in out
