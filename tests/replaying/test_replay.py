"""A replayed step is the step that was logged, bit for bit; whatever was altered is named."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from workspace import metrics, run

from lowlevel.checkpoints import checkpoint
from lowlevel.replaying.compare import number_rows, same_bits, tensors_row
from lowlevel.replaying.replay import replay_run
from lowlevel.replaying.report import Replay, ReplayDiffersError
from lowlevel.running.reopening import reopen
from lowlevel.running.run_folder import run_lock

STEPS = 14
PLAIN = {"learning_rate", "loss_scale", "skipped_steps", "epoch", "num_tokens", "supervised_tokens", "padding_share"}
PREFERENCE = {
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps/ref_chosen", "logps/ref_rejected",
}  # fmt: skip


def replay(folder, step, **options):
    found = replay_run(reopen(folder), step, **options)
    found.check()
    return found


def files_of(folder):
    return {
        p: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in folder.rglob("*") if p.is_file()
    }


def reseal(folder):
    """Give a checkpoint's manifest the hashes of the files that lie there now."""
    document = json.loads((folder / "manifest.json").read_text())
    payload = document["payload"]
    payload["files"] = {name: checkpoint._describe(folder / name) for name in payload["files"]}
    document["payload_sha256"] = checkpoint._payload_sha256(payload)
    (folder / "manifest.json").write_text(json.dumps(document))


def alter_line(folder, step, key, change):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["step"] == step and "loss" in record:
            record[key] = change(record[key])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def alter_weights(folder, file, name, by):
    tensors = load_file(folder / file)
    tensors[name].view(-1)[3] += by
    save_file(tensors, folder / file, metadata={"format": "pt"})


# What was not altered is identical


@pytest.mark.parametrize("name", ["sft", "dpo", "dpo8"])
def test_steps_are_identical(runs, name):
    before = files_of(runs.folder / name)
    saved = 0
    for step in (3, 5, 7, 10, 12, STEPS):
        found = replay(runs.folder / name, step)
        assert all(row.identical and row.difference == 0 for row in found.rows), step
        assert found.exact and found.start == (
            f"step-{(step - 1) // 5 * 5:08d}" if step > 5 else "the start of the run"
        )
        names = {row.quantity for row in found.rows if row.step == step}
        assert names >= {"loss", "grad_norm"} | PLAIN | (PREFERENCE if name != "sft" else set())
        assert {row.step for row in found.rows} == set(range((step - 1) // 5 * 5 + 1, step + 1))
        checked = {f"step-{step:08d} adapter", f"step-{step:08d} optimizer"}
        assert (names >= checked) == (step % 5 == 0 or step == STEPS)
        saved += names >= checked
        assert ("final adapter" in names) == (step == STEPS)
    assert saved >= 2
    assert files_of(runs.folder / name) == before, "nothing is written into a run"


def test_the_whole_run_from_its_start(runs):
    found = replay(runs.folder / "dpo", STEPS, start=0)
    assert found.start == "the start of the run" and found.first_difference is None
    assert {row.step for row in found.rows} == set(range(1, STEPS + 1))


def test_a_run_with_a_reference_cache_is_replayed_without_it(runs):
    before = files_of(runs.folder / "cache")
    found = replay(runs.folder / "cached", 14, start=0)
    assert before and all(row.identical for row in found.rows)
    assert files_of(runs.folder / "cache") == before


@pytest.mark.parametrize("step", [3, 8, 9, 13, 15])
def test_a_run_that_was_stopped_and_resumed(runs, step):
    found = replay(runs.folder / "stopped", step)
    assert all(row.identical for row in found.rows)
    assert found.start == {3: "the start of the run", 8: "step-00000005", 9: "step-00000008"}.get(step, "step-00000010")


@pytest.mark.parametrize("step", [2, 6, 8, 9, 12])
def test_means_over_windows(runs, step):
    """Also from a checkpoint in the middle of a window: it holds the window's sums."""
    found = replay(runs.folder / "thirds", step)
    assert all(row.identical for row in found.rows)
    compared = {row.step for row in found.rows if row.quantity == "loss"}
    assert compared == {n for n in (3, 6, 9, 12) if (step - 1) // 5 * 5 < n <= step}
    if step % 3:
        later = step + 3 - step % 3
        assert f"the line of step {later} has the means of steps {later - 2} to {later}" in found.notes[0]


def test_while_another_process_holds_the_run(runs, tmp_path):
    folder = runs.copy("sft", tmp_path)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')  # a line in the making
    with run_lock(folder):
        assert replay(folder, 7).first_difference is None


def test_a_damaged_checkpoint_is_passed_over(runs, tmp_path):
    folder = runs.copy("sft", tmp_path)
    with open(folder / "step-00000010" / "optimizer.safetensors", "r+b") as file:
        file.seek(-9, 2)
        file.write(b"\xff")
    said = run("replay", folder, "--step", "12")
    assert said.code == 0 and "skipped a damaged checkpoint" in said.out
    assert "replayed from step-00000005" in said.out and "6 logged steps, 6 to 11" in said.out


# What was altered is named


@pytest.mark.parametrize(
    ("key", "step", "asked"),
    [("loss", 8, 8), ("rewards/margins", 7, 9), ("grad_norm", 9, 9), ("logps/ref_chosen", 6, 9)],
)
def test_an_altered_number_is_reported_with_step_and_metric(runs, tmp_path, key, step, asked):
    folder = runs.copy("dpo", tmp_path)
    alter_line(folder, step, key, lambda value: value * (1 + 1e-12) if value else 1e-300)
    said = run("replay", folder, "--step", asked)
    assert said.code == 1
    assert said.err.startswith(f"error: the replay first differs at step {step}, {key}: logged ")
    assert (" NO" in said.out) == (step == asked)


def test_a_number_that_is_missing_is_reported(runs, tmp_path):
    folder = runs.copy("sft", tmp_path)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        record.pop("grad_norm")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    with pytest.raises(ReplayDiffersError, match="step 6, grad_norm: logged -, replayed"):
        replay(folder, 7)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_altered_tensors_of_the_steps_own_checkpoint_are_named(runs, tmp_path, file, sealed):
    folder = runs.copy("dpo", tmp_path)
    saved = folder / "step-00000010"
    name = list(load_file(saved / file))[1]
    alter_weights(saved, file, name, 2**-10)
    if sealed:
        reseal(saved)
    what = "adapter" if "adapter" in file else "optimizer"
    with pytest.raises(ReplayDiffersError) as caught:
        replay(folder, 10)
    assert f"step 10, step-00000010 {what}: {name}: " in str(caught.value)
    assert "1 of" in str(caught.value) and "difference 0.000977" in str(caught.value)


def test_altered_weights_that_a_replay_starts_from_show_in_the_first_step(runs, tmp_path):
    folder = runs.copy("sft", tmp_path)
    saved = folder / "step-00000010"
    alter_weights(saved, "adapter_model.safetensors", list(load_file(saved / "adapter_model.safetensors"))[0], 0.5)
    reseal(saved)
    with pytest.raises(ReplayDiffersError, match="first differs at step 11, loss: logged"):
        replay(folder, 13)


def test_other_rows_another_base_or_parent_are_refused(runs, tmp_path):
    folder = runs.copy("dpo", tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())

    def refused(code, text, **changes):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
        said = run("replay", folder, "--step", "3")
        assert (said.code, text in said.err) == (code, True), said.err

    refused(3, "not the rows that", data_sha256="0" * 64)
    refused(4, "is not the one that was trained on", base={**manifest["base"], "sha256": "0" * 64})
    refused(4, "base differ from its manifest", base={**manifest["base"], "load_in_4bit": False})
    refused(4, "not the frozen adapter of this run", parent_adapter="0" * 64)
    refused(4, "order_version differ", order_version=99)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--step", "15"), "the run has 14 steps"),
        (("--step", "7", "--from", "7"), "starts before it"),
        (("--step", "7", "--from", "3"), "has no such checkpoint; there are: 5, 10, 14, and 0"),
        (("--step", "7", "--dump-layers"), "--dump-layers needs --dump"),
        (("--step", "7", "--what-if", "beta=0.3"), "beta is a setting of dpo, and the run is sft"),
        (
            ("--step", "7", "--what-if", "seed=3"),
            "NAME one of learning_rate, max_grad_norm, loss_type, label_smoothing, z_loss_weight, loss_kwargs.KEY",
        ),
        (("--step", "7", "--what-if", "max_grad_norm=-1"), "max_grad_norm"),
    ],
)
def test_what_cannot_be_asked_for(runs, arguments, text):
    said = run("replay", runs.folder / "sft", *arguments)
    assert said.code == 2 and text in said.err and said.err.count("\n") == 1


def test_the_table(runs):
    said = run("replay", runs.folder / "dpo", "--step", "10")
    assert said.code == 0 and "replayed from step-00000005" in said.out
    assert "before it: 4 logged steps, 6 to 9" in said.out and "numbers, identical" in said.out
    logged = next(r for r in metrics(runs.folder / "dpo") if r["step"] == 10)
    line = next(line for line in map(str.strip, said.out.splitlines()) if line.startswith("rewards/margins"))
    assert line.split() == ["rewards/margins", *[f"{logged['rewards/margins']:.9g}"] * 2, "0", "yes"]
    assert any(
        line.startswith("step-00000010 adapter") and line.endswith("yes")
        for line in map(str.strip, said.out.splitlines())
    )


# Without bits, a tolerance


def test_a_run_of_another_device_is_compared_with_a_tolerance(runs, tmp_path):
    folder = runs.copy("sft", tmp_path)
    was = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**was, "device": "NVIDIA T4"}))
    alter_line(folder, 7, "loss", lambda value: value * 1.001)
    said = run("replay", folder, "--step", "7")
    assert said.code == 0 and "within tolerance" in said.out and "the run computed in fp32 on NVIDIA T4" in said.out
    alter_line(folder, 7, "loss", lambda value: value * 1.1)
    assert run("replay", folder, "--step", "7").code == 1


def test_the_tolerances():
    (row,) = number_rows(1, {"loss": 100.0}, {"loss": 100.9}, exact=False)
    assert row.good and not row.identical and row.difference == pytest.approx(0.9)
    assert not number_rows(1, {"loss": 100.0}, {"loss": 101.1}, exact=False)[0].good
    assert not number_rows(1, {"loss": 100.0}, {"loss": 100.0 + 1e-13}, exact=True)[0].good
    assert number_rows(1, {"loss": float("nan")}, {"loss": float("nan")}, exact=True)[0].identical
    ones = {"a": torch.ones(100), "codes": torch.zeros(4, dtype=torch.uint8)}
    near = {"a": torch.ones(100) * 1.04, "codes": torch.ones(4, dtype=torch.uint8)}
    far = {**near, "a": torch.ones(100) * 1.06}
    assert tensors_row(1, "w", ones, near, exact=False).good and not tensors_row(1, "w", ones, near, exact=True).good
    assert not tensors_row(1, "w", ones, far, exact=False).good
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    missing = tensors_row(1, "w", {"a": ones["a"]}, ones, exact=False)
    assert not missing.good and missing.quantity == "w: codes"


@pytest.mark.parametrize("difference", [0.0, 1e-9])
def test_why_numbers_may_differ_is_said_where_one_does(difference):
    rows = number_rows(3, {"loss": 0.5, "epoch": 1.0}, {"loss": 0.5 + difference, "epoch": 1.0}, exact=False)
    shown = repr(Replay(3, "the start", "other threads", rows))
    assert ("other threads: numbers may differ" in shown) == (difference > 0)
