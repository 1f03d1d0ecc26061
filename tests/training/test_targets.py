"""Target modules as names, a regular expression or "all-linear": the layers that plain PEFT adapts with the same."""

import json
from pathlib import Path

import helpers
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowlevel.config.file import load_config
from lowlevel.config.schema import LoraConfig, ModelConfig
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.adapters import read_adapter_config, save_adapter
from lowlevel.model.base import empty_model, load_base, load_model_config
from lowlevel.model.build import build_policy
from lowlevel.model.memory import AdapterSize, model_shape
from lowlevel.model.merging import adapter_updates, write_stacked_adapter
from lowlevel.model.policy import TRAINED
from lowlevel.model.targets import linear_layers, matched

PATTERN = r"model\.layers\.\d{1,3}\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
UNSLOTH = r"(?:.*?(?:layers|text).*?(?:self_attn|attn).*?(?:q_proj|o_proj).*?)|(?:\bmodel\.layers\.[1]\.mlp\.up_proj)"
TARGETS = [PATTERN, UNSLOTH, "all-linear", ["q_proj"], ["self_attn.k_proj", "layers.1.mlp.up_proj"]]


def plain(base: Path):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def stems(folder: Path) -> set[str]:
    keys = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").split(".lora_")[0] for key in keys}


def peft_adapter(base: Path, folder: Path, targets) -> Path:
    """As PEFT writes it, with `targets` as they were given and random B."""
    config = PeftLoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(plain(base), config)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": targets}))
    return folder


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_of_pefts_is_opened_continued_stacked_and_saved(tiny_base, tmp_path, targets):
    found = peft_adapter(tiny_base, tmp_path / "found", targets)
    assert stems(found) == set(matched(targets, linear_layers(plain(tiny_base)))) != set()
    ids = torch.arange(3, 40)[None]
    expected = PeftModel.from_pretrained(plain(tiny_base), found)(input_ids=ids).logits
    base = load_base(ModelConfig(name=str(tiny_base), load_in_4bit=False), helpers.CPU)
    policy = build_policy(base, LoraConfig(lora_dropout=0.0), helpers.CPU, seed=0, init_from=found)
    torch.testing.assert_close(policy.model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    save_adapter(policy.model, TRAINED, tmp_path / "saved", str(tiny_base))
    again = PeftModel.from_pretrained(plain(tiny_base), tmp_path / "saved")(input_ids=ids).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    over = helpers.make_policy(tiny_base, parent=found)
    save_adapter(over.model, TRAINED, tmp_path / "upper", str(tiny_base))
    write_stacked_adapter(found, tmp_path / "upper", tmp_path / "stacked")
    both = PeftModel.from_pretrained(plain(tiny_base), tmp_path / "stacked")(input_ids=ids).logits
    torch.testing.assert_close(over.model(input_ids=ids).logits, both, rtol=0, atol=1e-5)
    shape = model_shape(load_model_config(ModelConfig(name=str(tiny_base))), AdapterSize(4, _sizes(found)))
    assert shape.trained == sum(p.numel() for p in policy.flat.views.values())
    assert set(adapter_updates(found)) == stems(found)


def _sizes(folder: Path) -> tuple[str, ...]:
    targets = read_adapter_config(folder).target_modules
    return (targets,) if isinstance(targets, str) else tuple(targets)


def test_a_pattern_whose_layers_are_not_those_of_the_weights_is_refused(tiny_base, tmp_path):
    folder = peft_adapter(tiny_base, tmp_path / "found", PATTERN)
    tensors = load_file(folder / "adapter_model.safetensors")
    gone = {key: tensors.pop(key) for key in sorted(tensors) if ".layers.1.self_attn.v_proj." in key}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 adapter tensors missing: .*layers\.1\.self_attn\.v_proj\.lora_A"):
        helpers.make_policy(tiny_base, parent=folder)
    save_file({**tensors, **gone}, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": "(q_proj"}))
    with pytest.raises(CheckpointError, match=r"target_modules = '\(q_proj' is not a regular expression"):
        read_adapter_config(folder)


@pytest.mark.parametrize(("text", "names"), [
    ("all-linear", ("all-linear",)),
    ("q_proj,v_proj", ("q_proj", "v_proj")),
    ('["q_proj", "v_proj"]', ("q_proj", "v_proj")),
    (PATTERN, (PATTERN,)),
    (r"[a-z.]*\d[.]mlp[.]up_proj", (r"[a-z.]*\d[.]mlp[.]up_proj",)),
])  # fmt: skip
def test_target_modules_of_a_run_as_flag_and_in_a_file(tiny_base, tmp_path, text, names):
    config = load_config(None, {"lora.target_modules": text}).lora
    assert config.target_modules == names
    quoted = text if text.startswith('["') else f"'{text}'"
    (tmp_path / "run.toml").write_text(f"[lora]\ntarget_modules = {quoted}\n")
    assert load_config(tmp_path / "run.toml").lora == config
    policy = helpers.make_policy(tiny_base, targets=names)
    save_adapter(policy.model, TRAINED, tmp_path / "saved", str(tiny_base))
    layers = linear_layers(empty_model(load_model_config(ModelConfig(name=str(tiny_base)))))
    assert stems(tmp_path / "saved") == set(matched(names, layers)) != set()
    ids = torch.arange(3, 40)[None]
    opened = PeftModel.from_pretrained(plain(tiny_base), tmp_path / "saved")
    torch.testing.assert_close(opened(input_ids=ids).logits, policy.model(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("targets", "text"), [
    ((r"self_attn\.q_proj",), r"matches no layer; linear layers here: down_proj, .*matches the whole name"),
    (("q_proj", r".*\.v_proj"), r'"\.\*\\\.v_proj" matches no layer; .*a regular expression stands alone'),
    (("lm_head",), '"lm_head" matches no layer'),
    ((r".*lm_head",), "matches no layer"),
    (("(",), r'"\(" is not a regular expression'),
])  # fmt: skip
def test_targets_that_match_nothing_are_refused(tiny_base, targets, text):
    with pytest.raises(ConfigError, match=text):
        helpers.make_policy(tiny_base, targets=targets)
