"""`verify` on run files and folders: which weights, what is written, and how it ends."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from workspace import run

from lowlevel.config.file import load_config
from lowlevel.inspection.opening import inspect_run
from lowlevel.methods.choice import build_method, fitted
from lowlevel.model.attention_choice import NAMES, Attention
from lowlevel.preflight import numerics
from lowlevel.running.reopening import reopen
from lowlevel.running.training import run_training
from lowlevel.verification.opening import make_subject, open_run, verify_run
from lowlevel.verification.report import print_checks, run_checks
from lowlevel.verification.subject import Check, Subject


def verify(path, *options) -> str:
    said = run("verify", path, "--exact-parameters", 1_000_000, *options)
    assert said.code == 0, said.err
    return said.out


@pytest.fixture(scope="session")
def finished(space):
    for method in ("sft", "dpo"):
        more = {} if method == "sft" else {"model": {"adapter": str(space.folder / "run-sft")}}
        file = space.write(f"run-{method}", method, **more)
        run_training(load_config(file), Console(file=io.StringIO()))
    return space.folder


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_finished_run(finished, method):
    folder = finished / f"run-{method}"
    said = verify(folder, "--step", 2)
    written = json.loads((folder / "verify.json").read_text())
    assert written["ok"] and written["step"] == 2 and written["weights"] == "final adapter"
    assert all(check["name"][:40] in said for check in written["checks"])
    assert "loss_sha256" not in (folder / "manifest.json").read_text()
    names = {check["name"] for check in written["checks"]}
    assert "base as in the manifest" in names and ("frozen adapter as in the manifest" in names) == (method == "dpo")


def test_an_unfinished_run_takes_its_start_and_says_so(finished, space):
    import shutil

    folder = space.copy("run-sft", space.folder / "copies")
    shutil.rmtree(folder / "adapter")
    assert "the newest checkpoint" in verify(folder)
    for checkpoint in folder.glob("step-*"):
        shutil.rmtree(checkpoint)
    assert "it has not finished and saved no checkpoint" in verify(folder)


def test_a_run_file_and_a_step_that_is_not_there(finished, tmp_path):
    verify(finished / "run-dpo.toml", "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["ok"]
    for options, problem in (
        (("--step", 99), "--step 99: the run has 6 steps"),
        (("--json", tmp_path / "missing" / "result.json"), "no such folder"),
    ):
        said = run("verify", finished / "run-sft.toml", *options)
        assert said.code == 2 and problem in said.err


def test_a_failed_check_is_one_line_and_is_written(finished, monkeypatch, tmp_path):
    import lowlevel.verification.opening as opening

    checks = [Check("loss", "token", float("nan"), 1e-3, False, "a note")]
    monkeypatch.setattr(opening, "run_checks", lambda subject: checks)
    said = run("verify", finished / "run-sft.toml", "--json", tmp_path / "result.json")
    assert said.code == 1 and said.err == "error: 1 of 1 checks failed: loss: token nan > 0.001\n"
    assert "a note" in said.out
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["checks"][0]["measured"] is None and not written["ok"] and written["loss"] == "cross_entropy"


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_verify_inspect_and_doctor_lay_out_the_batch_as_the_run_does(finished, method, monkeypatch):
    spans = Attention(NAMES["math"], "as on a GPU")  # on a CPU batches have no shape
    opened = replace(reopen(finished / f"run-{method}"), attention=spans)
    rows, plain = opened.data()[1].train, build_method(opened.config, spans)
    shape = fitted(plain, opened.config, rows).shape
    assert shape not in (None, plain.shape)
    assert make_subject(open_run(opened), rows[:4], 0, 0).method.shape == shape
    assert inspect_run(opened, step=2).method.shape == shape

    inputs, seen = replace(numerics.check_inputs(config := numerics.demo_config(method)), attention=spans), []
    monkeypatch.setattr(numerics, "check_inputs", lambda config: inputs)
    monkeypatch.setattr(Subject, "run_step", lambda subject: seen.append(subject.method) or 1 / 0)
    pytest.raises(ZeroDivisionError, numerics.one_step, method)
    assert seen[0].shape == fitted(build_method(config, spans), config, inputs.data.train).shape


def test_a_run_from_python(finished):
    report = verify_run(reopen(finished / "run-sft"), step=2)
    assert report.ok and report.step == 2 and report.loss == "cross_entropy"
    assert "token log-probability" in repr(report) and "loss cross_entropy, step 2" in repr(report)


def test_a_base_too_large_for_float64_is_checked_in_its_own_precision(dpo):
    checks = run_checks(replace(dpo, exact_parameters=0))
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]
    assert not any("forward pass" in check.name for check in checks)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "dpop", "rpo", "discopop", "exo_pair", "aot"])
def test_other_losses(make, loss_type):
    more = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "aot") else {}
    checks = run_checks(make("dpo", dpo={"loss_type": loss_type, **more}, train={"per_device_train_batch_size": 4}))
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]


def test_the_policy_is_left_as_it_was(dpo):
    before = dpo.policy.flat.weights.detach().clone()
    run_checks(dpo)
    assert torch.equal(before, dpo.policy.flat.weights)
    assert not dpo.policy.flat.grad.any()
    assert {module.p for layer in dpo.policy.lora_layers for module in layer.lora_dropout.values()
            if hasattr(module, "salt") or hasattr(module, "state")} == {0.3}  # fmt: skip


def test_the_table_fits_80_columns():
    out = io.StringIO()
    checks = [Check("loss", "a name " * 12, 1.5, float("inf"), False, "a note"), Check("loss", "x", 0, 0, True)]
    print_checks(checks, Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80 and "FAIL" in out.getvalue()
    assert out.getvalue().rstrip().endswith(": a note")  # there is no room for it in the table
