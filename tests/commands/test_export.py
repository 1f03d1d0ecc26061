"""`lowlevel export`: files that other readers load, with the same logits and tokens; what is refused."""

import json
import shutil
import sys
from dataclasses import replace

import helpers
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizer_families import CHATML as CHATML_TEMPLATE
from tokenizer_families import FAMILIES, byte_level
from tokenizer_families import chat as chat_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import run

from lowlevel.errors import ConfigError
from lowlevel.exporting.gguf_model import UNKNOWN, interleaved, tokenizer_fields
from lowlevel.exporting.ollama import modelfile, read_pieces

HI = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """SFT and DPO of the built-in base, unquantised."""
    folder = tmp_path_factory.mktemp("export")
    common = ["--model.name", "demo", "--data.source", "demo", "--data.limit", 40, "--train.max_steps", 2]
    common += ["--train.learning_rate", 1e-2, "--lora.r", 4, "--model.load_in_4bit", "false"]
    assert run("sft", *common, "--train.output_dir", folder / "sft").code == 0
    dpo = [*common, "--model.adapter", folder / "sft", "--train.output_dir", folder / "dpo"]
    assert run("dpo", *dpo).code == 0
    return folder


def test_a_missing_gguf_package_is_said_before_the_merge(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    said = run("export", runs / "dpo", "--to", "ollama", "--out", tmp_path / "out")
    assert said.code == 2 and "lowlevel[export]" in said.err and not said.out


@pytest.mark.slow
def test_gguf_is_read_back_with_the_same_logits_and_tokens(runs, tmp_path):
    gguf = pytest.importorskip("gguf")
    assert run("merge", runs / "dpo", "--out", tmp_path / "merged").code == 0
    assert run("export", tmp_path / "merged", "--to", "gguf", "--out", tmp_path / "whole").code == 0
    said = run("export", runs / "dpo", "--to", "ollama", "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert f"{tmp_path}/." not in said.out  # the folder of the merged model, which is gone
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["Modelfile", "model.gguf"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    own, ids = AutoTokenizer.from_pretrained(tmp_path / "merged"), torch.arange(3, 90)[None]
    text = "Hello, 1234  two\n\nnaïve 東京 🙂 <|user|></s>"
    for folder in (tmp_path / "whole", tmp_path / "run"):
        found = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
        assert torch.equal(found(ids).logits, merged(ids).logits)
        read = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        assert read(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids
        fields = gguf.GGUFReader(folder / "model.gguf").fields
        assert fields["tokenizer.ggml.pre"].contents() == "smollm"
        assert fields["tokenizer.chat_template"].contents() == own.chat_template


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_adapter_in_gguf_added_to_its_base_has_pefts_logits(runs, tmp_path, stage):
    """dpo: SFT's and its own adapter as one of rank 8. The base is read with llama.cpp's order of rows."""
    gguf = pytest.importorskip("gguf")
    said = run("export", runs / stage, "--to", "gguf-adapter", "--out", tmp_path / "out")
    assert said.code == 0 and "--lora" in said.out, said.err
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "general.architecture")}
    assert list(fields.values()) == ["adapter", "lora", "llama"]
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    ids, folder = torch.arange(3, 90)[None], runs / stage / ("stacked" if stage == "dpo" else "adapter")
    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), folder)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.config.num_hidden_layers)
    before = base(ids).logits
    for key, weight in base.named_parameters():
        written = names.get_name(key, try_suffixes=(".weight",))
        if f"{written}.lora_a" not in found:
            continue
        a, b = found.pop(f"{written}.lora_a"), found.pop(f"{written}.lora_b")
        assert len(a) == (8 if stage == "dpo" else 4)
        update = alpha / b.shape[1] * b @ a
        heads = {"attn_q": base.config.num_attention_heads, "attn_k": base.config.num_key_value_heads}
        if heads := heads.get(written.split(".")[2]):  # pairs of neighbours, of which llama.cpp rotates each
            update = torch.cat([part.view(-1, 2, part.shape[1]).transpose(0, 1).flatten(0, 1)
                                for part in update.chunk(heads)])  # fmt: skip
        weight.data += update
    assert not found and (before - expected(ids).logits).abs().max() > 0.1
    assert (base(ids).logits - expected(ids).logits).abs().max() < 1e-4


def test_the_two_halves_of_a_head_take_turns():
    rows = torch.arange(8.0)[:, None].repeat(1, 3)  # 2 heads of 4
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_vllm_gets_both_adapters_as_one_that_peft_loads(runs, tmp_path):
    (runs / "dpo" / "stacked" / ".ipynb_checkpoints").mkdir()
    said = run("export", runs / "dpo", "--to", "vllm", "--out", tmp_path / "both")
    assert said.code == 0 and "--enable-lora --max-lora-rank 8 " in said.out, said.err
    settings = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (settings["r"], settings["bias"], settings["use_dora"], settings["modules_to_save"]) == (
        8,
        "none",
        False,
        None,
    )
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"], dtype=torch.float32)
    peft, ids = PeftModel.from_pretrained(base, tmp_path / "both").eval(), torch.arange(3, 90)[None]
    assert run("merge", runs / "dpo", "--out", tmp_path / "merged").code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (peft(ids).logits - merged(ids).logits).abs().max() < 2e-2  # the merged weights are in fp16


CHATML = """TEMPLATE \"\"\"{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ else if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
\"\"\"
"""
LLAMA3 = """TEMPLATE \"\"\"{{ range .Messages }}{{ if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>

{{ .Content }}<|eot_id|>{{ else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>

{{ .Content }}<|eot_id|>{{ else if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>

\"\"\"
"""
GEMMA = """TEMPLATE \"\"\"{{ range .Messages }}{{ if eq .Role "user" }}<start_of_turn>user
{{ .Content }}<end_of_turn>
{{ else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}<end_of_turn>
{{ end }}{{ end }}<start_of_turn>model
\"\"\"
"""


@pytest.mark.parametrize(
    ("family", "template", "stops"),
    [
        ("qwen 2.5", CHATML, {"</s>", "<|im_end|>"}),
        ("llama 3", LLAMA3, {"</s>", "<|eot_id|>"}),
        ("gemma", GEMMA, {"</s>", "<end_of_turn>"}),
    ],
)
def test_a_modelfile_says_the_trained_template(family, template, stops):
    text = modelfile(FAMILIES[family](), "model.gguf")
    assert text.startswith("FROM ./model.gguf\n" + template)
    assert {json.loads(line.split(maxsplit=2)[2]) for line in text.splitlines() if line.startswith("PARAM")} == stops


def test_a_system_message_that_the_template_writes_itself():
    chat = FAMILIES["qwen 2.5"]()
    implied = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    text = implied + chat.chat_template.text
    changed = _with_template(chat, text)
    assert read_pieces(changed).system == "Be kind."
    assert 'SYSTEM """Be kind."""' in modelfile(changed, "model.gguf")
    odd = _with_template(chat, text.replace("+ '<|im_end|>", "+ loop.index | string + '<|im_end|>"))
    with pytest.raises(ConfigError, match="more than a text before and after each message"):
        modelfile(odd, "model.gguf")


def test_a_bos_token_that_begins_each_message_is_no_bos():
    """SmolLM 2: bos is <|im_start|>, which llama.cpp must not add to that of the template."""
    chat = chat_of(byte_level(), CHATML_TEMPLATE, bos="<|im_start|>", eos="<|im_end|>")
    assert not tokenizer_fields(chat, len(chat.tokenizer))["add_add_bos_token"]
    assert CHATML in modelfile(chat, "model.gguf")


def _with_template(chat, text):
    return replace(chat, chat_template=replace(chat.chat_template, text=text))


# Pre-tokenizers; None: SentencePiece.
KNOWN = {"gpt2": "gpt-2", "roberta": "gpt-2", "llama 3": "llama-bpe", "llama 2": None, "zephyr": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_which_tokenizers_are_written(family):
    chat = FAMILIES[family]()
    size = len(chat.tokenizer) + 5
    if family not in KNOWN:
        with pytest.raises(ConfigError, match="tokenizer's kind .* is not known here; llama.cpp's convert_hf_to_gguf"):
            tokenizer_fields(chat, size)
        return
    fields = tokenizer_fields(chat, size)
    tokens, types = fields["add_token_list"], fields["add_token_types"]
    assert fields.get("add_tokenizer_pre") == KNOWN[family] and len(tokens) == len(types) == size
    assert [chat.tokenizer.convert_tokens_to_ids(token) for token in tokens[:-5]] == [*range(size - 5)]
    assert types[chat.eos_id] == 3 and types[-1] == 5
    assert fields["add_add_bos_token"] == (chat.encode_prompt(HI)[0] == chat.tokenizer.bos_token_id)
    if KNOWN[family] is None:
        scores = dict(zip(tokens, fields["add_token_scores"], strict=True))
        merges = json.loads(chat.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        ranked = [scores["".join(merge)] for merge in merges]
        assert ranked == sorted(ranked, reverse=True) and types[tokens.index("<0x0A>")] == 6
        assert types.count(UNKNOWN) == 1


def test_what_is_refused_in_one_line(runs, tmp_path):
    adapter = runs / "sft" / "adapter"
    dora, loftq = (shutil.copytree(runs / "sft", tmp_path / name) for name in ("dora", "loftq"))
    settings = dora / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    weights = loftq / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "init_lora_weights": "loftq"})
    cases = [
        ((adapter, "gguf"), "neither a run folder nor the folder of a whole model"),
        ((tmp_path, "ollama"), "neither a run folder"),
        ((_folder(tmp_path / "qwen", model_type="qwen2"), "gguf"), "a qwen2 model is not written here"),
        ((_folder(tmp_path / "biased", attention_bias=True), "gguf"), "a llama model with biases"),
        ((_folder(tmp_path / "plain"), "vllm"), "is a whole model: vllm serve"),
        ((tmp_path / "plain", "gguf-adapter"), "is a whole model"),
        ((dora, "gguf-adapter"), "DoRA cannot be added to W"),
        ((loftq, "gguf-adapter"), "LoftQ cannot be added to W"),
    ]
    for (source, to), line in cases:
        said = run("export", source, "--to", to, "--out", tmp_path / "out")
        (error,) = said.err.splitlines()
        assert said.code == 2 and line in error, error
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert "exists: give a new folder" in run("export", runs / "sft", "--to", "vllm", "--out", tmp_path / "out").err


def _folder(folder, **settings):
    """The tiny base with other settings in its config.json."""
    helpers.write_tiny_base(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder
