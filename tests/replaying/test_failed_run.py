"""A run that met a number that is not finite: what it leaves, how it is replayed, and that a later start forgets it."""

import json
import shutil

import helpers
import pytest
from safetensors.torch import load_file
from workspace import CHATS, PAIRS, break_letter, let_nan_through, run

from lowlevel.model.policy import Policy
from lowlevel.running import forensics

BAD = 17  # the only row that has the letter whose embedding is damaged


@pytest.fixture(scope="module", params=["sft", "dpo"])
def failed(request, runs, tmp_path_factory):
    """A run folder, its run file and what the run said; packed, with a checkpoint a step.

    A base with a NaN is refused; it is let through here, so that a row meets a number that is not finite in training.
    """
    folder, method = tmp_path_factory.mktemp("failed"), request.param
    base = shutil.copytree(runs.space.base, folder / "tiny")
    break_letter(base)
    rows = json.loads(json.dumps(CHATS if method == "sft" else PAIRS))
    if method == "sft":
        rows[BAD]["messages"][0]["content"] += " Q"
    else:
        rows[BAD]["prompt"] += " Q"
    source = helpers.write_jsonl(folder / "rows.jsonl", rows)
    path = runs.space.write(
        "run", method, folder=folder, model={"name": str(base)}, data={"source": str(source), "packing": True},
        train={"save_steps": 1, "logging_steps": 1},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        let_nan_through(patch)
        yield folder / "run", path, method, run(method, path)


def test_the_line_names_module_row_and_folder(failed):
    folder, _, _, said = failed
    assert said.code == 5 and said.err.count("\n") == 1
    assert "loss is nan; nothing was updated" in said.err
    assert "first not finite: output of embed_tokens, whose weights are not finite (forward of the" in said.err
    assert f"data rows [{BAD}])" in said.err and said.err.rstrip().endswith(f"; see {folder / 'failure'}")


def test_what_lies_in_the_folder(failed):
    folder, _, method, said = failed
    assert {p.name for p in (folder / "failure").iterdir()} == {"failure.json", "micro-batch.safetensors"}
    report = json.loads((folder / "failure" / "failure.json").read_text())
    assert report["damaged_rows"] == [BAD] and BAD in report["data_rows"] and BAD in report["micro_batch_rows"]
    assert report["module"] == "embed_tokens" and report["weights_not_finite"] == ["embed_tokens.weight"]
    assert (report["quantity"], report["value"]) == ("loss", "nan")
    assert report["loss_scale_history"] == [{"loss_scale": 1.0, "loss": "nan", "grad_norm": "nan"}]
    assert report["replay"] == f"lowlevel replay {folder} --step {report['step']}"
    assert report["where"] == ("forward of the reference" if method == "dpo" else "forward of the policy")
    batch = load_file(folder / "failure" / "micro-batch.safetensors")
    assert {"input_ids", "targets", "dropout_keys"} < batch.keys()
    status = json.loads((folder / "run-status.json").read_text())
    assert (status["state"], status["exit"]) == ("failed", 5) and "embed_tokens" in status["error"]
    assert not list(folder.glob(".tmp-*"))


def test_its_replay_fails_alike_and_still_writes_the_dump(failed, tmp_path):
    folder, _, _, said = failed
    step = json.loads((folder / "failure" / "failure.json").read_text())["step"]
    again = run("replay", folder, "--step", step, "--dump", tmp_path / "dump")
    assert again.code == 5 and again.err.rstrip() == said.err.rstrip().partition("; see ")[0]
    files = json.loads((tmp_path / "dump" / "index.json").read_text())["files"]
    assert any(load_file(tmp_path / "dump" / f)["losses"].isnan().any() for f in files if f.startswith("micro"))
    assert step == 1 or run("replay", folder, "--step", step - 1).code == 0


def test_a_later_start_forgets_the_failure(failed, tmp_path):
    """It fails again at the same step, and what lies there is of the new failure; a row that was mended runs on."""
    folder, path, method, _ = failed
    (folder / "failure" / "old").write_text("of another failure")
    assert run(method, path, "--resume").code == 5
    assert not (folder / "failure" / "old").exists() and (folder / "failure" / "failure.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowlevel.running.forensics.explained", lambda error, *_: error)
        assert run(method, path, "--resume").code == 5
        assert not (folder / "failure").exists(), "the resumed run cleared it before it trained"
        assert run(method, path, "--restart").code == 5


def test_an_examination_that_breaks_hides_nothing(failed, monkeypatch):
    folder, path, method, said = failed

    def broken(self, batch):
        if calls:
            raise RuntimeError("examination broke")
        return original(self, batch)

    calls, original, explained = [], Policy.scored_hidden_states, forensics.explained
    monkeypatch.setattr(Policy, "scored_hidden_states", broken)
    monkeypatch.setattr("lowlevel.running.forensics.explained", lambda *a: calls.append(1) or explained(*a))
    again = run(method, path, "--restart")
    assert again.code == 5 and again.err.startswith(said.err.partition("; first")[0])
    assert "not examined: RuntimeError: examination broke" in again.err
    assert "examination broke" in (folder / "failure" / "failure.json").read_text()
    calls.clear()
    monkeypatch.setattr(
        "lowlevel.running.forensics.write_failure", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    again = run(method, path, "--restart")
    assert again.code == 5 and "no report written ([Errno 28] full)" in again.err
