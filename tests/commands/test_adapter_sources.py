"""An adapter starts another run on the base and on the frozen adapter that it was trained on, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from workspace import metrics

UNDER = "was trained on a frozen adapter"
SHORT = ("--train.max_steps", "1", "--train.save_steps", "1")


def train(cli, runs, tmp_path, *options):
    shape = {"r": None, "lora_alpha": None} if "--lora.init_from" in options else {}
    config = runs.space.write("next", "dpo", folder=tmp_path, lora=shape)
    return cli("dpo", config, *SHORT, *options)


@pytest.mark.parametrize("name", ["", "adapter", "step-00000003"])
@pytest.mark.parametrize("key", ["model.adapter", "lora.init_from"])
def test_an_adapter_that_stands_on_another_is_refused_by_whatever_path(runs, cli, tmp_path, key, name):
    said = train(cli, runs, tmp_path, f"--{key}", runs.dpo / name)
    assert (said.code, said.err.count("\n")) == (2, 1), said.err
    assert f"{key}: {runs.dpo / (name or 'adapter')} {UNDER}" in said.err
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("name", ["stacked", "parent"])
def test_what_stands_on_the_base_alone_is_taken(runs, cli, tmp_path, name):
    said = train(cli, runs, tmp_path, "--model.adapter", runs.dpo / name)
    assert said.code == 0, said.err


def test_training_goes_on_over_the_same_frozen_adapter(runs, cli, tmp_path):
    """Its first step starts from the rewards that the DPO run ended with; over another adapter it is refused."""
    said = train(cli, runs, tmp_path, "--model.adapter", runs.sft, "--lora.init_from", runs.dpo)
    assert said.code == 0, said.err
    first = metrics(tmp_path / "next")[0]
    assert abs(first["rewards/margins"]) > 1e-3, "it starts where the other ended"
    said = train(
        cli, runs, tmp_path, "--restart", "--model.adapter", runs.dpo / "stacked", "--lora.init_from", runs.dpo
    )
    assert said.code == 2
    assert f"lora.init_from: {runs.dpo / 'adapter'} {UNDER}: set model.adapter to that one" in said.err


@pytest.fixture
def other_base(runs, tmp_path) -> Path:
    """The same shape and name, one weight changed."""
    other = Path(shutil.copytree(runs.space.base, tmp_path / "elsewhere" / runs.space.base.name))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_an_adapter_of_another_base_is_refused(runs, cli, tmp_path, other_base):
    for options in (("--model.adapter", runs.sft), ("--lora.init_from", runs.sft / "adapter")):
        said = train(cli, runs, tmp_path, *options, "--model.name", other_base)
        assert (said.code, said.err.count("\n")) == (2, 1), said.err
        assert f"{options[0][2:]}: {runs.sft / 'adapter'} was trained on the base" in said.err
        assert json.loads((runs.sft / "manifest.json").read_text())["base"]["sha256"][:12] in said.err
    taken = Path(shutil.copytree(runs.sft / "adapter", tmp_path / "taken"))
    said = train(cli, runs, tmp_path, "--model.adapter", taken, "--model.name", other_base)
    assert said.code == 0, said.err
    assert "note:" not in said.out


@pytest.mark.parametrize("where", ["a PEFT folder", "a run in other 4-bit constants"])
def test_a_base_of_another_name_is_said_where_its_weights_cannot_be_told(runs, cli, tmp_path, where):
    if where == "a PEFT folder":
        folder = Path(shutil.copytree(runs.sft / "adapter", tmp_path / "taken"))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/other"}))
        options = ()
    else:
        folder = runs.space.copy("sft", tmp_path)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["base"]["name"] = "some/other"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        options = ("--model.bnb_4bit_use_double_quant", "false")
    said = train(cli, runs, tmp_path, "--model.adapter", folder, *options)
    assert said.code == 0, said.err
    line = next(line for line in said.out.splitlines() if line.startswith("note: "))
    assert "names some/other as its base" in line.replace('"', "").replace("'", "")


def test_a_manifest_that_is_not_a_runs_says_nothing(runs, cli, tmp_path):
    folder = Path(shutil.copytree(runs.sft / "adapter", tmp_path / "site" / "adapter"))
    for manifest in ({"base": "/", "parent_adapter": "x"}, {"base": {"sha256": "0" * 64}}, {"name": "a web page"}):
        (tmp_path / "site" / "manifest.json").write_text(json.dumps(manifest))
        said = train(cli, runs, tmp_path, "--restart", "--model.adapter", folder)
        assert said.code == 0, said.err


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: [v.zero_() for name, v in t.items() if "lora_B" in name], "each lora_B is zero: it is untrained"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(3, 4)}),
            "1 adapter tensors left over: base_model.model.model.embed_tokens.weight; it also has whole layers",
        ),
    ],
)
def test_an_adapter_that_is_less_or_more_than_one(runs, cli, tmp_path, edit, message):
    adapter = Path(shutil.copytree(runs.sft / "adapter", tmp_path / "adapter"))
    change(adapter, edit)
    said = train(cli, runs, tmp_path, "--model.adapter", adapter)
    assert said.code == 4 and message in said.err, said.err


def test_an_adapter_trained_with_another_chat_template_is_named(runs, cli, tmp_path):
    (tmp_path / "other.jinja").write_text((runs.space.base / "chat_template.jinja").read_text() + "{# another #}")
    for options, count in (((), 0), (("--data.chat_template_from", tmp_path / "other.jinja", "--restart"), 1)):
        said = train(cli, runs, tmp_path, "--model.adapter", runs.sft, *options)
        assert said.code == 0, said.err
        assert " ".join(said.out.split()).count("was trained with another chat template") == count
