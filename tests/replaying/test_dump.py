"""A dump holds the numbers of the step; other settings give what a run with them would have done."""

import json

import pytest
import torch
from safetensors.torch import load_file
from workspace import metrics, run

from lowlevel.losses import dpo_loss
from lowlevel.replaying.dump import Dump
from lowlevel.replaying.session import open_session, parse_settings, what_if
from lowlevel.running.reopening import reopen


def dumped(folder, step, target, *more):
    said = run("replay", folder, "--step", step, "--dump", target, *more)
    assert said.code == 0, said.err
    index = json.loads((target / "index.json").read_text())
    files = {name: load_file(target / name) for name in index["files"]}
    for name, tensors in files.items():
        described = {k: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for k, t in tensors.items()}
        assert described == index["files"][name]
    return index, files


def logged(folder, step):
    return next(r for r in metrics(folder) if r["step"] == step and "loss" in r)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_dump_adds_up_to_what_was_logged(runs, tmp_path, name):
    folder, line = runs.folder / name, logged(runs.folder / name, 10)
    index, files = dumped(folder, 10, tmp_path / "dump")
    micros = [files[f"micro-{i}.safetensors"] for i in range(len(index["micro_batches"]))]
    assert len(micros) + 1 == len(files), "no layers unless they are asked for"
    losses = sum(float(micro["losses"].sum()) for micro in micros)
    assert losses / index["count"] == pytest.approx(line["loss"], rel=1e-6)
    step = files["step.safetensors"]
    gradient = torch.cat([t.flatten() for k, t in step.items() if k.startswith("gradient.")])
    assert float(gradient.norm()) == pytest.approx(line["grad_norm"], rel=1e-5)
    before, after = load_file(folder / "step-00000010" / "adapter_model.safetensors"), {}
    for key in (key for key in step if key.startswith("after.")):
        after[key.removeprefix("after.").replace(".trained.", ".")] = step[key]
        assert torch.equal(step[key] - step[key.replace("after.", "before.")], step[key.replace("after.", "update.")])
        assert step[key.replace("after.", "update.")].abs().max() > 0 or "lora_B" not in key
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    optimizer = load_file(folder / "step-00000010" / "optimizer.safetensors")
    assert all(torch.equal(step[f"optimizer.after.{key}"], value) for key, value in optimizer.items())
    assert not torch.equal(step["optimizer.before.flat::state1"], step["optimizer.after.flat::state1"])
    for micro in micros:
        assert {f"batch.{key}" for key in ("input_ids", "position_ids", "targets", "dropout_keys")} < micro.keys()
        assert micro["policy.hidden"].shape == (len(micro["batch.scored_targets"]), 64)
        index_of = micro["batch.sequence_index"]
        tokens = torch.cat([micro["policy.token_logps"], torch.zeros(1)])
        assert torch.allclose(tokens[index_of].sum(-1), micro["policy.logps"])
    if name == "dpo":
        chosen = sum(float(micro["reference.logps"].chunk(2)[0].sum()) for micro in micros)
        assert chosen / index["count"] == pytest.approx(line["logps/ref_chosen"], rel=1e-6)
        first = micros[0]
        output = dpo_loss(*first["policy.logps"].chunk(2), *first["reference.logps"].chunk(2), beta=0.1)
        assert torch.equal(output.losses, first["losses"])
    else:
        assert not any(key.startswith("reference") for key in micros[0])


def test_layers(runs, tmp_path):
    _, files = dumped(runs.folder / "dpo", 3, tmp_path / "dump", "--dump-layers")
    layers, micro = files["layers-0.safetensors"], files["micro-0.safetensors"]
    assert layers.keys() == {f"layer.{i}.{who}" for i in (0, 1) for who in ("policy", "reference")}
    assert all(layer.shape == (*micro["batch.input_ids"].shape, 64) for layer in layers.values())
    assert not torch.equal(layers["layer.1.policy"], layers["layer.1.reference"])


def test_a_dump_does_not_change_the_replay_and_takes_no_folder_that_exists(runs, tmp_path):
    target = tmp_path / "dump"
    dumped(runs.folder / "sft", 10, target)
    said = run("replay", runs.folder / "sft", "--step", "10", "--dump", target)
    assert said.code == 2 and "exists: give a new folder" in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["dump"], "no temporary folder stays"


def test_what_comes_while_a_dump_is_written_is_not_replaced(runs, tmp_path, monkeypatch):
    original = Dump.index

    def index(self):
        (tmp_path / "dump").mkdir()
        (tmp_path / "dump" / "file").write_text("mine")
        return original(self)

    monkeypatch.setattr(Dump, "index", index)
    said = run("replay", runs.folder / "sft", "--step", "10", "--dump", tmp_path / "dump")
    assert said.code == 2 and "exists: give a new folder" in said.err
    assert [path.name for path in tmp_path.rglob("*")] == ["dump", "file"]


def outcomes(folder, step, *texts):
    session = open_session(reopen(folder), step)
    while session.state.step < step - 1:
        session.advance()
    weights = session.policy.flat.weights.detach().clone()
    found = what_if(session, [(text, parse_settings(session.config, text)) for text in texts])
    assert torch.equal(session.policy.flat.weights, weights)
    return {outcome.settings: outcome.numbers for outcome in found}


def test_other_settings_beside_the_actual_ones(runs):
    found = outcomes(runs.folder / "dpo", 10, "beta=0.1", "beta=0.3", "loss_type=ipo", "learning_rate=0.02")
    line, actual = logged(runs.folder / "dpo", 10), found["actual"]
    for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert actual[key] == line[key]
    assert found["beta=0.1"] == actual and actual["cosine"] == pytest.approx(1)
    larger = found["beta=0.3"]
    assert larger["rewards/margins"] == pytest.approx(3 * actual["rewards/margins"], rel=1e-5)
    assert larger["logps/chosen"] == actual["logps/chosen"] and larger["loss"] != actual["loss"]
    assert 0.5 < larger["cosine"] < 0.999
    assert -1 < found["loss_type=ipo"]["cosine"] < 0, "ipo draws a margin back to 1 / (2 beta)"
    assert found["learning_rate=0.02"]["update_norm"] == pytest.approx(2 * actual["update_norm"], rel=1e-3)
    assert found["learning_rate=0.02"]["grad_norm"] == actual["grad_norm"]


def test_another_beta_is_what_a_run_with_it_logs(runs, tmp_path):
    """Of the first step: later ones stand on other weights."""
    path = runs.space.write(
        "other", "dpo", folder=tmp_path,
        model={"adapter": str(runs.folder / "parent-adapter")},
        dpo={"disable_dropout": False, "beta": 0.4, "loss_type": "hinge"},
        data={"packing": True, "max_length": 96}, train={"max_steps": 1, "optim": "paged_adamw_32bit"},
    )  # fmt: skip
    assert run("dpo", path).code == 0
    found = outcomes(runs.folder / "dpo", 1, "beta=0.4,loss_type=hinge")["beta=0.4,loss_type=hinge"]
    line = logged(tmp_path / "other", 1)
    assert {k: found[k] for k in ("loss", "grad_norm", "rewards/margins")} == {
        k: line[k] for k in ("loss", "grad_norm", "rewards/margins")
    }


def test_what_if_leaves_the_replay_identical_and_prints_a_table(runs):
    said = run(
        "replay", runs.folder / "dpo", "--step", "10", "--what-if", "beta=0.3", "--what-if", "max_grad_norm=0.01"
    )
    assert said.code == 0, said.err
    assert "only this step, under other settings" in said.out and "max_grad_norm=0.01" in said.out
    assert run("replay", runs.folder / "sft", "--step", "1", "--what-if", "learning_rate=1e-3").code == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("beta=-1", "beta"),
        ("loss_type=nothing", "nothing"),
        ("label_smoothing=0.1", "label_smoothing"),
        ("beta", "NAME=VALUE"),
    ],
)
def test_settings_that_a_run_could_not_have(runs, text, problem):
    said = run("replay", runs.folder / "dpo", "--step", "2", "--what-if", text)
    assert said.code == 2 and problem in said.err
