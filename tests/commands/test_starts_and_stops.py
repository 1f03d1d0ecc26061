"""A run that starts from an adapter, and one that ends before its last step."""

import json

import torch
from safetensors.torch import load_file
from workspace import HELD_OUT, metrics

import lowlevel.model.layers
import lowlevel.running.job


def test_training_goes_on_from_an_adapter(runs, cli, tmp_path):
    """The first step has rate 0 (warm-up), so after it the adapter is what it started from."""
    config = runs.space.write(
        "more",
        "sft",
        folder=tmp_path,
        lora={"init_from": str(runs.sft), "r": None, "lora_alpha": None},
        data={"eval_source": "holdout", "eval_limit": HELD_OUT},
        train={"max_steps": 2, "warmup_steps": 1, "save_steps": 1},
    )
    said = cli("sft", config)
    assert said.code == 0, said.err
    start = load_file(runs.sft / "adapter" / "adapter_model.safetensors")
    first, second = (load_file(tmp_path / "more" / f"step-0000000{n}" / "adapter_model.safetensors") for n in (1, 2))
    assert all(torch.equal(start[name], first[name]) for name in start)
    assert not any(torch.equal(start[name], second[name]) for name in start)
    last = [record["eval_loss"] for record in metrics(runs.sft) if "eval_loss" in record][-1]
    assert metrics(tmp_path / "more")[0]["eval_loss"] == last
    before, after = (
        json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (runs.sft, tmp_path / "more")
    )
    assert (after["r"], after["lora_alpha"]) == (before["r"], before["lora_alpha"]) == (4, 8)


def test_early_stopping_ends_a_run_that_does_not_get_better(runs, cli, tmp_path):
    """At a rate of 1e-30 no loss changes: the first evaluation is the best, the next two have no gain."""
    config = runs.space.write(
        "early",
        "sft",
        folder=tmp_path,
        data={"eval_source": "holdout", "eval_limit": 2},
        train={"learning_rate": 1e-30, "eval_steps": 1, "early_stopping_patience": 2, "max_steps": 10},
    )
    said = cli("sft", config)
    assert said.code == 0, said.err
    assert [record["step"] for record in metrics(tmp_path / "early") if "eval_loss" in record] == [0, 1, 2, 3]
    status = json.loads((tmp_path / "early" / "run-status.json").read_text())
    assert (status["state"], status["step"], status["checkpoint"]) == ("finished", 3, "step-00000003")
    assert (tmp_path / "early" / "adapter" / "adapter_model.safetensors").exists()


def test_more_patience_lets_an_early_stopped_run_go_on(runs, cli, tmp_path):
    """With as much as before, resuming takes no step."""
    patience = {"learning_rate": 1e-30, "eval_steps": 1, "early_stopping_patience": 1, "max_steps": 6}
    holdout = {"eval_source": "holdout", "eval_limit": 2}
    config = runs.space.write("patient", "sft", folder=tmp_path, data=holdout, train=patience)
    assert cli("sft", config).code == 0

    def last_step() -> int:
        return json.loads((tmp_path / "patient" / "run-status.json").read_text())["step"]

    assert last_step() == 2
    assert cli("sft", config, "--resume").code == 0 and last_step() == 2
    said = cli("sft", config, "--resume", "--train.early_stopping_patience", 3,
               "--allow-change", "train.early_stopping_patience")  # fmt: skip
    assert said.code == 0, said.err
    assert last_step() == 4


def test_a_run_whose_compiler_fails_in_the_first_evaluation_goes_on_eager(runs, cli, tmp_path, monkeypatch):
    """The evaluation before step 1 is the first to run the layers; its numbers are those of an eager run."""

    def broken(*arguments, **named):
        raise RuntimeError("no compiler in [/usr/bin]")  # markup to rich, if it is taken for that

    holdout = {"eval_source": "holdout", "eval_limit": 2}
    plain, falls = (runs.space.write(name, "sft", folder=tmp_path, data=holdout, train={"max_steps": 1})
                    for name in ("plain", "falls"))  # fmt: skip
    assert cli("sft", plain).code == 0
    monkeypatch.setattr(lowlevel.running.job, "choose_execution", lambda *_: "compiled")
    monkeypatch.setattr(lowlevel.model.layers.DecoderLayers, "_with_marks", lambda self, forward, plain: broken)
    said = cli("sft", falls)
    assert said.code == 0, said.err
    assert " ".join(said.out.split()).count("compiled failed (no compiler in [/usr/bin]); continuing eager") == 1
    one, other = (
        [record["eval_loss"] for record in metrics(tmp_path / name) if "eval_loss" in record]
        for name in ("plain", "falls")
    )
    assert one == other and len(one) == 2


def test_epochs_that_would_never_end_make_no_folder(runs, cli, tmp_path):
    config = runs.space.write("endless", "sft", folder=tmp_path, train={"max_steps": None, "num_train_epochs": 1e300})
    said = cli("sft", config)
    assert said.code == 2 and "at most 1,000,000,000" in said.err
    assert not (tmp_path / "endless").exists()
