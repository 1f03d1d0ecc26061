"""adapter/, stacked/ and merged folders work with transformers and PEFT alone, from any working folder, offline."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from workspace import CHATS, HELD_OUT, metrics, reply

from lowlevel.config.schema import RunConfig
from lowlevel.demo import DEMO_BASE
from lowlevel.model.base import base_location
from lowlevel.running.reopening import load_run
from lowlevel.running.result_files import model_card
from lowlevel.running.run_folder import RunFolder

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def plain(space, cli, tmp_path_factory) -> Path:
    """SFT and DPO runs on the unquantised base with a chat template of their own, and the merged DPO run."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "mine.jinja").write_text(TEMPLATE)
    data = {"chat_template_from": str(folder / "mine.jinja"), "eval_source": "holdout", "eval_limit": HELD_OUT}
    for method, model in (("sft", {}), ("dpo", {"adapter": str(folder / "sft")})):
        path = space.write(method, method, folder=folder, data=data, model={"load_in_4bit": False, **model})
        said = cli(method, path)
        assert said.code == 0, said.err
    assert cli("merge", folder / "dpo", "--out", folder / "merged").code == 0
    return folder


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(("run", "result"), [("sft", "adapter"), ("dpo", "stacked")])
def test_peft_loads_the_policy_from_any_folder(plain, offline, run, result):
    model = AutoPeftModelForCausalLM.from_pretrained(str(plain / run / result)).eval()
    loaded = load_run(plain / run)
    tokenizer = AutoTokenizer.from_pretrained(str(plain / run / result))
    messages = CHATS[0]["messages"][:1]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert ids.input_ids[0].tolist() == loaded.tokenizer.encode_prompt(messages)
    loaded.activate(loaded.stages[-1])
    expected = logits(loaded.policy.model, ids.input_ids)
    torch.testing.assert_close(logits(model, ids.input_ids), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (logits(model, ids.input_ids) - expected).abs().max() > 1e-2, "the adapter has an effect"


def test_each_result_has_the_template_and_the_stops_of_its_run(plain):
    for folder in (plain / "sft" / "adapter", plain / "dpo" / "adapter", plain / "dpo" / "stacked", plain / "merged"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
        generation = GenerationConfig.from_pretrained(folder)
        assert (generation.eos_token_id, generation.pad_token_id) == ([2], 0), folder


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.mark.parametrize("result", ["sft/adapter", "dpo/adapter", "dpo/stacked", "merged"])
def test_the_lines_of_the_card_run_and_reply(plain, monkeypatch, capsys, result):
    monkeypatch.chdir(plain / result)
    names: dict = {}
    exec(code_of(Path("README.md").read_text()), names)  # noqa: S102
    assert "Hello" in capsys.readouterr().out
    assert isinstance(names["model"].get_input_embeddings(), torch.nn.Embedding)
    if result == "dpo/adapter":
        assert names["folder"] == "../stacked" and "lacks the frozen adapter" in Path("README.md").read_text()


def test_the_lines_of_a_card_quantise_as_the_run_did(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.dpo / "stacked")
    names: dict = {}
    exec(code_of(Path("README.md").read_text()), names)  # noqa: S102
    config = names["model"].base_model.model.config.quantization_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)


def test_the_card_has_the_facts(runs, merged):
    manifest = json.loads((runs.dpo / "manifest.json").read_text())
    report = json.loads((runs.dpo / "data_report.json").read_text())
    losses = [record["loss"] for record in metrics(runs.dpo) if "loss" in record]
    held_out = [record["eval_loss"] for record in metrics(runs.dpo) if "eval_loss" in record]
    for folder, library in ((runs.dpo / "adapter", "peft"), (runs.dpo / "stacked", "peft"), (merged, "transformers")):
        card = (folder / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert front == {
            "library_name": library,
            "pipeline_tag": "text-generation",
            "tags": ["lowlevel", "lora", "dpo"],
        }
        for fact in (
            manifest["base"]["sha256"],
            manifest["parent_adapter"],
            str(runs.space.base),
            f"18 of pairs.jsonl, {report['train']['tokens']['total']:,} tokens",
            f"{HELD_OUT} of ",
            f"{losses[0]:.4f} (step 2) -> {losses[-1]:.4f} (step 6)",
            f"{held_out[0]:.4f} (step 0) -> {held_out[-1]:.4f} (step 6)",
            "loss sigmoid, beta 0.1",
            f"torch {torch.__version__.partition('+')[0]}",
        ):
            assert fact in card, fact


def test_a_base_on_the_hub_is_in_the_front_matter_and_the_adapter_has_its_name(runs):
    config = RunConfig().model_copy(update={"model": RunConfig().model.model_copy(update={"name": "some/base"})})
    card = model_card(RunFolder(runs.sft), config, "adapter")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "some/base"
    assert base_location("some/base") == "some/base"
    assert base_location("demo") == str(DEMO_BASE)
    assert "Apache" not in card and "license:" in card


def test_an_adapter_copied_out_of_its_run_replies_in_its_template(plain, cli, tmp_path):
    copied = shutil.copytree(plain / "sft" / "adapter", tmp_path / "copied")
    assert load_run(plain / "sft").tokenizer.chat_template.text == TEMPLATE
    assert reply(cli, copied) == reply(cli, copied) != ""
    assert AutoTokenizer.from_pretrained(copied).chat_template == TEMPLATE


def test_a_result_without_tokenizer_files_still_opens(runs, cli, tmp_path):
    """Adapter folders of older versions: two files, and only the name of a local base."""
    old = shutil.copytree(runs.sft, tmp_path / "old")
    for path in (old / "adapter").iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    config = json.loads((old / "adapter" / "adapter_config.json").read_text())
    (old / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}))
    assert reply(cli, old) == reply(cli, runs.sft)
    path = runs.space.write("next", "dpo", folder=tmp_path, model={"adapter": str(old)}, train={"max_steps": 1})
    said = cli("dpo", path)
    assert said.code == 0 and "note" not in said.out, said.err


def next_lines(out: str) -> list[list[str]]:
    lines = out.split("next:\n")[1].splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  ")]


@pytest.mark.parametrize(("method", "names"), [("sft", ["generate", "dpo", "inspect"]),
                                               ("dpo", ["generate", "compare", "inspect"])])  # fmt: skip
def test_the_commands_shown_at_the_end_run_as_they_are(runs, cli, tmp_path, monkeypatch, method, names):
    monkeypatch.chdir(tmp_path)
    run = getattr(runs, method)
    copied = shutil.copytree(run, tmp_path / method)  # other tests share the run
    commands = next_lines(runs.said[method].out.replace(str(run), str(copied)))
    assert [command[1] for command in commands] == names
    shutil.copy(runs.space.dpo_rows, tmp_path / "pairs.jsonl")
    for program, *arguments in commands:
        assert program == "lowlevel"
        said = cli(*arguments, *(["--train.max_steps", "1"] if arguments[0] == "dpo" else []))
        assert said.code == 0, said.err
    if method == "sft":
        assert (tmp_path / "sft-dpo" / "stacked").exists()


def test_the_commands_of_an_unquantised_run_have_its_base_settings(plain, space, cli, tmp_path):
    said = cli("sft", plain / "sft.toml", "--train.output_dir", tmp_path / "a b", "--train.max_steps", 1)
    assert said.code == 0, said.err
    dpo = next_lines(said.out)[1]
    options = dict(zip(dpo[2::2], dpo[3::2], strict=True))
    assert options["--model.load_in_4bit"] == "false" and options["--model.adapter"] == str(tmp_path / "a b")
    assert options["--model.name"] == str(space.base)
    assert options["--data.chat_template_from"] == str(plain / "mine.jinja")


def test_a_merged_model_is_complete_too(plain, offline):
    model = AutoModelForCausalLM.from_pretrained(plain / "merged")
    assert model.generation_config.eos_token_id in (2, [2])
