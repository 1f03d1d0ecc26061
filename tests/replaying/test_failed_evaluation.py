"""A held-out loss that is not finite ends a run as a training loss does: it is neither logged nor counted."""

import json
import math
import shutil

import helpers
import pytest
from workspace import CHATS, PAIRS, break_letter, let_nan_through, metrics, run

import lowlevel.running.job

BAD = 3  # the only held-out row that has the letter whose embedding is damaged
EARLY = {"save_steps": 1, "logging_steps": 1, "eval_steps": 1, "early_stopping_patience": 2}


def spoil(patch: pytest.MonkeyPatch, number: int, value: float) -> None:
    """Evaluation `number` of the runs to come gives this loss."""
    original, calls = lowlevel.running.job.evaluate_examples, []

    def evaluate(*arguments, **keywords):
        scores = original(*arguments, **keywords)
        calls.append(scores)
        return {**scores, "eval_loss": value} if len(calls) == number else scores

    patch.setattr(lowlevel.running.job, "evaluate_examples", evaluate)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_in_the_middle_does_not_stop_the_run_as_finished(runs, tmp_path, monkeypatch, value):
    path = runs.space.write(
        "run", "sft", folder=tmp_path, train=EARLY, data={"eval_source": "holdout", "eval_limit": 4}
    )
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, 3, value)
        said = run("sft", path)
    assert said.code == 5 and said.err.count("\n") == 1
    assert said.err.startswith(
        f"error: step 2: eval_loss is {value} over 4 held-out rows; every module was finite when"
    )
    status = json.loads((folder / "run-status.json").read_text())
    assert (status["state"], status["exit"], status["checkpoint"]) == ("failed", 5, "step-00000001")
    assert [record["step"] for record in metrics(folder) if "eval_loss" in record] == [0, 1]
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    report = json.loads((folder / "failure" / "failure.json").read_text())
    assert (report["step"], report["quantity"], report["value"]) == (2, "eval_loss", str(value))
    assert report["replay"] is None and "evaluation was run again" in report["notes"][0]
    assert len(report["data_rows"]) == 4
    again = run("sft", path, "--resume")
    assert again.code == 0, again.err
    assert metrics(folder)[-1]["step"] == 6 and not (folder / "failure").exists()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_held_out_row_is_named(runs, tmp_path, monkeypatch, method):
    """Before the first step; a base with a NaN is refused, and let through here."""
    base = shutil.copytree(runs.space.base, tmp_path / "tiny")
    break_letter(base)
    rows = json.loads(json.dumps(CHATS if method == "sft" else PAIRS))[:6]
    if method == "sft":
        rows[BAD]["messages"][0]["content"] += " Q"
    else:
        rows[BAD]["prompt"] += " Q"
    source = helpers.write_jsonl(tmp_path / "held-out.jsonl", rows)
    path = runs.space.write("run", method, folder=tmp_path, model={"name": str(base)}, train={"eval_steps": 2},
                            data={"eval_source": str(source), "packing": True})  # fmt: skip
    let_nan_through(monkeypatch)
    said = run(method, path)
    assert said.code == 5 and said.err.startswith("error: step 0: eval_loss is nan over 6 held-out rows; first not fin")
    assert "output of embed_tokens, whose weights are not finite (forward of the" in said.err
    assert f"data rows [{BAD}])" in said.err and said.err.rstrip().endswith(f"; see {tmp_path / 'run' / 'failure'}")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    report = json.loads((tmp_path / "run" / "failure" / "failure.json").read_text())
    assert report["damaged_rows"] == [BAD] and BAD in report["micro_batch_rows"]
