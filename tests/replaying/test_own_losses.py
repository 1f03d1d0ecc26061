"""A run with a user's own loss: replayed, dumped, taken under other settings, and refused if the source changed."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from workspace import Workspace, make_workspace, metrics, run

from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.losses.registry import OWN, loss
from lowlevel.replaying.session import open_session, parse_settings, what_if
from lowlevel.running.reopening import reopen

SOURCE = """
import torch
from torch.nn.functional import logsigmoid

def capped(pairs, *, beta, gamma=1.0):
    ratios = gamma * torch.tanh((pairs.token_logps - pairs.ref_token_logps) / gamma)
    sums = ratios.new_zeros(2 * len(pairs.deltas) + 1).index_add(0, pairs.sequence_ids, ratios)[:-1]
    chosen, rejected = sums.chunk(2)
    return -logsigmoid(beta * (chosen - rejected)), {"capped": chosen.detach()}

def focal(tokens, *, gamma=1.0):
    return -(1.0001 - tokens.token_logps.exp()) ** gamma * tokens.token_logps
"""
STEPS = {"max_steps": 3, "save_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def trained(space):
    """The folder of two runs, "own-sft" and "own-dpo", with losses of a module in it."""
    (space.folder / "own_losses.py").write_text(SOURCE)
    sys.path.insert(0, str(space.folder))
    for method, name in (("sft", "focal"), ("dpo", "capped")):
        section = {"loss_type": f"own_losses:{name}", "loss_kwargs": {"gamma": 1.5}}
        path = space.write(f"own-{method}", method, train=STEPS, data={"packing": True}, **{method: section})
        said = run(method, path)
        assert said.code == 0, said.err
    yield space.folder
    sys.path.remove(str(space.folder))


def other_source():
    """The module's losses as edited after the run."""
    import own_losses

    space = {}
    exec(SOURCE.replace("capped(", "changed("), space)
    return own_losses, space["changed"]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_replay_is_identical_and_a_dump_adds_up(trained, tmp_path, method):
    folder = trained / f"own-{method}"
    said = run("replay", folder, "--step", 3, "--dump", tmp_path / "dump")
    assert said.code == 0 and "replayed from step-00000002" in said.out, said.err
    index = json.loads((tmp_path / "dump" / "index.json").read_text())
    losses = sum(float(load_file(file)["losses"].sum()) for file in (tmp_path / "dump").glob("micro-*"))
    assert losses / index["count"] == pytest.approx(metrics(folder)[2]["loss"], rel=1e-6)
    assert run("verify", folder, "--exact-parameters", 1_000_000).code == 0


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_another_hyper_parameter(trained, method):
    session = open_session(reopen(trained / f"own-{method}"), 1)
    texts = ("loss_kwargs.gamma=1.5", f"{method}.loss_kwargs.gamma=0.1")
    found = what_if(session, [(text, parse_settings(session.config, text)) for text in texts])
    actual, same, other = (outcome.numbers["loss"] for outcome in found)
    assert actual == same == metrics(trained / f"own-{method}")[0]["loss"]
    assert (actual != other) == (method == "sft"), "the first step of dpo has no margins"
    with pytest.raises(ConfigError, match="does not use delta"):
        parse_settings(session.config, "loss_kwargs.delta=1")


def test_the_manifest_holds_the_hash_of_the_source(trained):
    assert len(json.loads((trained / "own-dpo" / "manifest.json").read_text())["loss_sha256"]) == 64


def test_a_changed_source_is_refused(trained, monkeypatch):
    module, changed = other_source()
    folder = trained / "own-dpo"
    monkeypatch.setattr(module, "capped", changed)
    for command in (("verify", folder), ("replay", folder, "--step", 2), ("inspect", folder, "--step", 2)):
        said = run(*command)
        assert said.code == CheckpointError.exit_code and said.err.count("\n") == 1
        assert 'loss "own_losses:capped": its source is not the run\'s (hash ' in said.err
    path = trained / "own-dpo.toml"
    path.write_text(path.read_text().replace("max_steps = 3", "max_steps = 4"))
    said = run("dpo", path, "--resume", "--allow-change", "train.max_steps")
    assert said.code == 2 and "loss_sha256: " in said.err
    both = ("--allow-change", "train.max_steps", "--allow-change", "loss_sha256")
    said = run("dpo", path, "--resume", *both)
    assert said.code == 0 and metrics(folder)[-1]["step"] == 4, said.err
    assert run("verify", folder, "--exact-parameters", 1_000_000).code == 0


def test_a_loss_that_is_not_registered_here_is_named(space, tmp_path):
    path = space.write("named", "dpo", folder=tmp_path, train={"max_steps": 1}, dpo={"loss_type": "tanh"})
    loss(lambda pairs, *, beta: -torch.tanh(beta * pairs.deltas), name="tanh")
    assert run("dpo", path).code == 0
    OWN.clear()
    for command in (
        ("verify", tmp_path / "named"),
        ("replay", tmp_path / "named", "--step", 1),
        ("dpo", path, "--resume"),
    ):
        said = run(*command)
        assert said.code == 2 and "'tanh'" in said.err
        assert "import the module that registers it" in said.err and '"module:function"' in said.err
    assert run("generate", tmp_path / "named", "--prompt", "hello", "--max-new-tokens", 2).code == 0
