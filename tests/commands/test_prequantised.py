"""Runs on a pre-quantised base: SFT, DPO on its adapter, and every command that opens them."""

import json
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from plain_models import divergence
from refusals import refused
from transformers import AutoModelForCausalLM
from workspace import metrics, reply

WORDS = "4-bit fp4 base, pre-quantised without double quantisation"


@pytest.fixture(scope="module")
def base(space) -> Path:
    """fp4 without double quantisation, everything else in bfloat16."""
    return helpers.write_stored_base(space.base, space.folder / "tiny-bnb-4bit", "fp4", False)


@pytest.fixture(scope="module")
def folders(space, cli, base) -> dict[str, Path]:
    """The SFT run and the DPO run on its adapter; the SFT run was stopped and resumed."""
    train = {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    model = {"name": str(base)}
    sft = space.write("stored-sft", "sft", model=model, train={**train, "max_steps": 2})
    said = cli("sft", sft)
    assert said.code == 0 and f"{base}, {WORDS}, fp32 on CPU" in said.out.replace("\n", ""), said.err + said.out
    longer = space.write("stored-sft", "sft", model=model, train=train)
    assert (said := cli("sft", longer, "--resume", "--allow-change", "train.max_steps")).code == 0, said.err
    model["adapter"] = str(space.folder / "stored-sft")
    data = {"eval_source": "holdout", "eval_limit": 4}
    dpo = space.write("stored-dpo", "dpo", model=model, data=data, train=train, trace={"every": 2})
    assert (said := cli("dpo", dpo)).code == 0, said.err
    return {method: space.folder / f"stored-{method}" for method in ("sft", "dpo")}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_every_command_opens_the_run(cli, folders, method):
    run = folders[method]
    commands = [("verify", run)]
    if method == "dpo":
        commands += [("replay", run, "--step", 3), ("inspect", run, "--step", 3), ("report", run), ("compare", run)]
        first = next(record for record in metrics(run) if "loss" in record)
        assert first["loss"] == pytest.approx(0.693147, abs=1e-6)  # reference: base + SFT adapter
    for command in commands:
        said = cli(*command)
        assert said.code == 0, said.err + said.out
    assert reply(cli, run)


def test_the_record_says_what_the_folder_is(folders):
    run = folders["sft"]
    found = json.loads((run / "manifest.json").read_text())["base"]
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    assert {key: found[key] for key in kind} == kind
    assert found["prequantised"] is True and found["dtype"] == "float32" and found["name"] == "tiny-bnb-4bit"
    text = (run / "config.toml").read_text()
    assert 'bnb_4bit_quant_type = "fp4"' in text and "bnb_4bit_use_double_quant = false" in text
    card = (run / "adapter" / "README.md").read_text()
    assert "4-bit fp4, pre-quantised without double quantisation" in card and "BitsAndBytesConfig" not in card


def test_plan_says_what_the_folder_is(cli, space, base):
    config = space.write("planned", "sft", model={"name": str(base)})
    assert WORDS in cli("plan", config).out


def test_an_older_run_on_a_folder_in_fp32_still_opens(cli, space, tmp_path):
    """Its numbers were right; its manifest does not say that the base was pre-quantised."""
    base = helpers.write_stored_base(space.base, tmp_path / "fp32", dtype=torch.float32)
    train = {"max_steps": 2, "save_steps": 1}
    config = space.write("old", "sft", folder=tmp_path, model={"name": str(base)}, train=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowlevel.running.assembly.load_stored", lambda model: None)
        assert cli("sft", config).code == 0
    assert "prequantised" not in json.loads((tmp_path / "old" / "manifest.json").read_text())["base"]
    assert (said := cli("replay", tmp_path / "old", "--step", 2)).code == 0, said.err
    assert (said := cli("sft", config, "--resume")).code == 0, said.err


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_merge_into_the_dequantised_base(cli, folders, tmp_path, method):
    said = cli("merge", folders[method], "--into", "dequantized", "--out", tmp_path / "merged")
    assert said.code == 0, said.err
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    assert reply(cli, tmp_path / "merged") == reply(cli, folders[method])


@pytest.mark.parametrize("into", ["original", "requantized"])
def test_what_needs_16_bit_weights_takes_a_base_that_has_them(cli, folders, space, base, tmp_path, into):
    run, out = folders["sft"], tmp_path / "out"
    merge = ("merge", run, "--into", into, "--out", out)
    refused(cli(*merge), 2, f"--into {into} needs the base's 16-bit weights", "tiny-bnb-4bit", "--base")
    refused(cli(*merge, "--base", base), 2, "needs the base's 16-bit weights")
    refused(cli("merge", run, "--base", space.base, "--out", out), 2, "--base is for --into original and requantized")
    helpers.write_tiny_base(tmp_path / "larger", vocab_size=400)
    refused(cli(*merge, "--base", tmp_path / "larger"), 2, "embed_tokens.weight is (400, 64)", "(320, 64)")
    helpers.write_tiny_base(tmp_path / "other", initializer_range=0.5)
    refused(cli(*merge, "--base", tmp_path / "other"), 2, "from the run's base: another model", "%")
    assert not out.exists()
    said = cli(*merge, "--base", space.base)
    assert said.code == 0 and f"merged into {into} base {space.base}" in said.out.replace("\n", ""), said.err
    assert f"| merged into | {space.base} |" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config.get("quantization_config", {}).get("bnb_4bit_quant_type") == ("fp4" if into != "original" else None)
    if into == "original":
        plain = AutoModelForCausalLM.from_pretrained(space.base, dtype=torch.float32)
        assert (
            divergence(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), plain) < 1
        )  # a trained version


def test_refusals_come_before_any_work(cli, space, folders, base, tmp_path):
    def start(method: str, **model: object):
        config = space.write("run", method, folder=tmp_path, model={"name": str(base), **model})
        said = cli(method, config)
        assert not (tmp_path / "run").exists()
        return said

    refused(start("sft", load_in_4bit=False), 2, "model.load_in_4bit = false contradicts", "fp4")
    refused(start("sft", bnb_4bit_quant_type="nf4"), 2, "model.bnb_4bit_quant_type = nf4 contradicts")
    adapter = {"adapter": str(folders["sft"]), "adapter_mode": "original"}
    refused(start("dpo", **adapter), 2, 'adapter_mode = "original" needs the base\'s 16-bit weights')
    gptq = Path(shutil.copytree(space.base, tmp_path / "gptq"))
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    for command in ("sft", "data", "plan"):
        file = space.write("run", "sft", folder=tmp_path, model={"name": str(gptq)})
        refused(cli(command, file), 2, "quantised with gptq", "use the original model")
