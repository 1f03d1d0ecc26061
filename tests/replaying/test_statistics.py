"""Losses with statistics of the vocabulary or with weights: runs are replayed, dumped, traced, inspected, verified."""

import json

import helpers
import pytest
import torch
from safetensors.torch import load_file
from workspace import CHATS, make_workspace, metrics, run

from lowlevel.checkpoints.tables import read_table
from lowlevel.replaying.session import open_session, parse_settings, what_if
from lowlevel.running.reopening import reopen

SECTIONS = {
    "smoothed": {"loss_type": "smoothed_cross_entropy", "z_loss_weight": 0.01},
    "weighted": {"loss_type": "smoothed_cross_entropy", "z_loss_weight": 0.01},
    "wpo": {"loss_type": "wpo"},
}
STEPS = {"max_steps": 3, "save_steps": 2, "logging_steps": 1}
TRACE = {"every": 1, "level": "token", "gradients": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the runs."""
    space = make_workspace(tmp_path_factory.mktemp("statistics"))
    rows = [{**row, "w": 0.5 + i % 3} for i, row in enumerate(CHATS)]
    for row in rows[::2]:
        row["messages"] = [*row["messages"][:-1], {**row["messages"][-1], "weight": 0.25}]
    weighted = {"source": str(helpers.write_jsonl(space.folder / "weighted.jsonl", rows)), "weight_column": "w"}
    weighted |= {"eval_source": "holdout", "eval_limit": 4}
    for name, section in SECTIONS.items():
        method = "dpo" if name == "wpo" else "sft"
        data = weighted if name == "weighted" else {}
        said = run(method, space.write(name, method, train=STEPS, trace=TRACE, data=data, **{method: section}))
        assert said.code == 0, said.err
    return space.folder


@pytest.mark.parametrize("name", SECTIONS)
def test_a_replay_is_identical_and_a_dump_adds_up(trained, tmp_path, name):
    folder = trained / name
    line = next(record for record in metrics(folder) if record["step"] == 3 and "loss" in record)
    said = run("replay", folder, "--step", 3, "--dump", tmp_path / "dump")
    assert said.code == 0 and "replayed from step-00000002" in said.out, said.err
    index = json.loads((tmp_path / "dump" / "index.json").read_text())
    micros = [load_file(file) for file in (tmp_path / "dump").glob("micro-*")]
    assert sum(float(one["losses"].sum()) for one in micros) / index["count"] == pytest.approx(line["loss"], rel=1e-6)
    statistic = "policy.log_square_sum" if name == "wpo" else "policy.lse"
    assert all(one[statistic].shape == one["policy.token_logps"].shape for one in micros)
    if name == "smoothed":
        lse = torch.cat([one["policy.lse"] for one in micros])
        assert line["z_loss"] == pytest.approx(0.01 * float(lse.square().mean()), rel=1e-5)
    if name == "weighted":
        weights, lse = (torch.cat([one[key] for one in micros]) for key in ("batch.token_weights", "policy.lse"))
        assert {*weights.tolist()} <= {own * row for own in (0.25, 1) for row in (0.5, 1.5, 2.5)}
        assert index["count"] == pytest.approx(float(weights.sum()))
        assert line["z_loss"] == pytest.approx(0.01 * float(lse.square() @ weights / weights.sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["weighted", "wpo"])
def test_it_is_verified_and_inspected(trained, name):
    assert run("verify", trained / name, "--exact-parameters", 1_000_000).code == 0
    said = run("inspect", trained / name, "--step", 2)
    assert said.code == 0, said.err


def test_the_weight_of_a_pair_is_that_of_its_traced_tokens(trained):
    for row in read_table(trained / "wpo" / "trace", "pairs").to_pylist():
        weight = 1.0
        for side in ("chosen", "rejected"):
            likeness = torch.tensor(row[f"{side}_token_logps"]) - torch.tensor(row[f"{side}_log_square_sum"])
            weight *= float(likeness.mean().exp())
        assert row["metrics/wpo_weight"] == pytest.approx(weight, rel=1e-5)
        assert row["weight"] == pytest.approx(weight / (1 + 2.718281828459045 ** row["margin"]), rel=1e-4)


def test_another_hyper_parameter(trained):
    session = open_session(reopen(trained / "smoothed"), 1)
    texts = ("label_smoothing=0.1", "label_smoothing=0.4", "z_loss_weight=0", "loss_type=dft,z_loss_weight=0")
    settings = [(text, parse_settings(session.config, text)) for text in texts]
    actual, *others = (outcome.numbers["loss"] for outcome in what_if(session, settings))
    assert actual == others[0] == metrics(trained / "smoothed")[0]["loss"]
    assert len({actual, *others[1:]}) == 4
