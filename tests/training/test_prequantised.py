"""Bases whose folder is quantised already: everything comes to the run's precision, and what cannot be trained or
contradicts the folder is refused by name. The right values are made from the tensors of the file, without transformers.
"""

import json
import shutil
import warnings
from pathlib import Path

import bitsandbytes as bnb
import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowlevel.config.schema import LoraConfig, ModelConfig, RunConfig
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.base import base_sha256, describe_base, load_base, load_model_config, load_stored
from lowlevel.model.memory import AdapterSize, Plan, forecast, model_shape
from lowlevel.model.placement import DTYPES, Placement
from lowlevel.model.quantisation import as_stored
from lowlevel.running.assembly import with_stored

SAVED = (torch.float32, torch.float16, torch.bfloat16)
IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Pre-quantised folders of a tiny base with biases, made once each."""
    folder = tmp_path_factory.mktemp("stored")
    helpers.write_tiny_base(folder / "base", attention_bias=True)

    def make(kind: str = "nf4", double: bool = True, dtype: torch.dtype = torch.bfloat16, **settings: object) -> Path:
        name = "-".join(str(part) for part in (kind, double, dtype, *settings.values())).replace("/", "")
        known = (folder / name).exists()
        return folder / name if known else helpers.write_stored_base(
            folder / "base", folder / name, kind, double, dtype, **settings
        )  # fmt: skip

    return make


def weights_of_the_file(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every weight in `dtype`: 4-bit ones dequantised in fp32 by bitsandbytes, then rounded."""
    tensors = load_file(folder / "model.safetensors")
    plain = {name: t for name, t in tensors.items() if not name.endswith((".absmax", "quant_map")) and "__" not in name}
    plain = {name: t for name, t in plain.items() if not name.endswith(".nested_absmax")}
    for name in plain:
        parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        if parts:
            state = bnb.functional.QuantState.from_dict(parts, torch.device("cpu"))
            state.dtype = torch.float32
            plain[name] = bnb.functional.dequantize_4bit(plain[name], state)
    return {name: tensor.to(dtype) for name, tensor in plain.items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", SAVED, ids=str)
@pytest.mark.parametrize("kind,double", [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
def test_everything_comes_to_the_runs_precision(stored, kind, double, dtype, precision):
    folder, run = stored(kind, double, dtype), DTYPES[precision]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_base(ModelConfig(name=str(folder)), Placement(torch.device("cpu"), precision))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    kinds = {(m.compute_dtype, m.weight.quant_state.dtype, m.weight.quant_state.quant_type) for m in layers.values()}
    assert kinds == {(run, run, kind)} and len(layers) == 14
    assert {m.weight.quant_state.nested for m in layers.values()} == {double}
    for name, expected in weights_of_the_file(folder, run).items():
        found = model.get_parameter(name)
        if name.removesuffix(".weight") in layers and name.endswith(".weight"):
            found = bnb.functional.dequantize_4bit(found.data, found.quant_state)
            assert torch.allclose(found.float(), expected.float(), rtol=torch.finfo(run).eps, atol=1e-7), name
        else:
            assert torch.equal(found, expected), name
        assert found.dtype == run, name


@torch.no_grad()
def test_the_logits_are_those_of_the_dequantised_weights_in_fp32(stored):
    folder = stored("fp4", False)
    model = load_base(ModelConfig(name=str(folder)), helpers.CPU)
    plain = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    plain.load_state_dict(weights_of_the_file(folder, torch.float32))
    assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-4)


def test_the_same_weights_give_the_same_hash_whatever_holds_their_bytes(stored):
    """A folder in fp32 is what quantising while loading gives, so runs on it and its hash are as before."""
    usual = load_base(ModelConfig(name=str(stored().parent / "base")), helpers.CPU)
    assert base_sha256(usual) == base_sha256(load_base(ModelConfig(name=str(stored(dtype=torch.float32))), helpers.CPU))
    both = [stored(), stored(bnb_4bit_quant_storage=torch.bfloat16)]
    assert len({base_sha256(load_base(ModelConfig(name=str(folder)), helpers.CPU)) for folder in both}) == 1


def altered(folder: Path, to: Path, *, config=None, tensors=None) -> Path:
    """A copy with other entries in config.json and other tensors; None removes one."""
    shutil.copytree(folder, to)
    for file, changes in (("config.json", config or {}),):
        found = {**json.loads((to / file).read_text()), **changes}
        (to / file).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    if tensors:
        found = {**load_file(to / "model.safetensors"), **tensors}
        save_file({k: t for k, t in found.items() if t is not None}, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("double", [True, False])
def test_weights_beyond_fp16_are_refused_in_fp16(stored, tmp_path, double):
    name = "model.layers.0.mlp.up_proj.weight" + (".nested_absmax" if double else ".absmax")
    folder = stored(double=double)
    big = load_file(folder / "model.safetensors")[name] * 1e6
    folder = altered(folder, tmp_path / "big", tensors={name: big})
    load_base(ModelConfig(name=str(folder)), helpers.CPU)
    with pytest.raises(CheckpointError, match="1 tensor not finite in float16: model.layers.0.mlp.up_proj"):
        load_base(ModelConfig(name=str(folder)), Placement(torch.device("cpu"), "fp16"))
    norm = {"model.norm.weight": torch.full((64,), 1e5, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match="not finite in float16: model.norm.weight"):
        load_base(
            ModelConfig(name=str(altered(stored(), tmp_path / "n", tensors=norm))),
            Placement(torch.device("cpu"), "fp16"),
        )


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OTHERS = {
    "8-bit": {"quantization_config": {**BNB, "load_in_4bit": False, "load_in_8bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "'compressed": {"compression_config": {"quant_method": "'compressed-tensors'"}},
    "hqq": {"quantization_config": {"quant_method": "hqq"}},
    "aqlm": {"quantization_config": {"quant_method": "aqlm"}},
    "torchao": {"quantization_config": {"quant_method": "torchao"}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "bitnet": {"quantization_config": {"quant_method": "bitnet"}},
    "of-tomorrow": {"quantization_config": {"quant_method": "of-tomorrow"}},
    "an unnamed method": {"quantization_config": {"bits": 4}},
    "known: nf4, fp4": {"quantization_config": {**BNB, "bnb_4bit_quant_type": "int4"}},
}


@pytest.mark.parametrize("said", OTHERS)
def test_other_quantisations_are_refused_by_name(tiny_base, tmp_path, said):
    folder = altered(tiny_base, tmp_path / "base", config=OTHERS[said])
    with pytest.raises(ConfigError, match=said) as refusal:
        load_model_config(ModelConfig(name=str(folder)))
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


def test_null_is_no_quantisation(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert load_stored(ModelConfig(name=str(folder))) is None


@pytest.mark.parametrize("name", ["qweight", "qzeros", "weight.absmax", "SCB", "weight_scale_inv", "weight_packed"])
def test_quantised_weights_that_config_json_does_not_mention(tiny_base, tmp_path, name):
    extra = {f"model.layers.0.mlp.up_proj.{name}": torch.zeros(2)}
    folder = altered(tiny_base, tmp_path / "base", tensors=extra)
    with pytest.raises(ConfigError, match=rf"up_proj.{name}\), but config.json has no quantization_config"):
        load_stored(ModelConfig(name=str(folder)))


def test_config_json_must_agree_with_the_weights(stored, tiny_base, tmp_path):
    def refused(folder: Path, text: str, kind: type = ConfigError) -> None:
        with pytest.raises(kind, match=text):
            load_base(ModelConfig(name=str(folder)), helpers.CPU)

    folder = altered(
        stored(), tmp_path / "a", config={"quantization_config": {**BNB, "bnb_4bit_use_double_quant": False}}
    )
    refused(folder, "says nf4 without double quantisation, its weights are nf4 with double quantisation")
    fp4 = {"quantization_config": {**BNB, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}}
    refused(altered(stored(), tmp_path / "b", config=fp4), "says fp4 with .* its weights are nf4 with")
    refused(altered(tiny_base, tmp_path / "c", config=fp4), "the files hold none: remove its quantization_config")
    refused(stored(llm_int8_skip_modules=["model.layers.1"]), "its LM head is quantised")
    helpers.write_tiny_base(tmp_path / "tied", tie_word_embeddings=True)
    tied = helpers.write_stored_base(tmp_path / "tied", tmp_path / "e", llm_int8_skip_modules=["model.layers.1"])
    refused(tied, "config.json says that lm_head is quantised; it is not", CheckpointError)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("load_in_4bit", False, "model.load_in_4bit = false contradicts"),
        ("bnb_4bit_quant_type", "nf4", "model.bnb_4bit_quant_type = nf4 contradicts"),
        ("bnb_4bit_use_double_quant", True, "model.bnb_4bit_use_double_quant = true contradicts"),
    ],
)
def test_settings_that_contradict_the_folder(stored, key, value, said):
    folder = stored("fp4", False)
    found = load_stored(ModelConfig(name=str(folder)))
    own = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    with pytest.raises(ConfigError, match=said):
        as_stored(ModelConfig(name=str(folder), **{key: value}), found)
    for given in ({}, {key: own[key]}, own):  # defaults and the folder's own values are no contradictions
        assert as_stored(ModelConfig(name=str(folder), **given), found).model_dump(include=own.keys()) == own


def test_the_forecast_and_the_words_are_of_the_folder(stored):
    kept = ["lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj"]
    folder = stored("fp4", False, llm_int8_skip_modules=kept)
    config = with_stored(RunConfig(model=ModelConfig(name=str(folder)), lora=LoraConfig(r=4)))
    base, adapter = load_model_config(config.model), AdapterSize(4, ("q_proj", "up_proj"))
    shape = model_shape(base, adapter)
    linear, left = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 3 * 64 * 128 + 64 * 64
    assert (shape.linear, shape.unquantised) == (linear, left)
    assert shape.adapted == 64 * 64 + 64 * 128  # q_proj of layer 1 and up_proj of layer 0
    static = forecast(shape, config, Plan(128, 0, False), Placement(torch.device("cuda"), "fp16")).static
    assert static["base weights"] == (linear - left) // 2 + left * 2
    assert static["quantisation constants"] == (linear - left) // 64 * 4  # fp32, as there is no double quantisation
    assert describe_base(config.model) == (
        "4-bit fp4 base, pre-quantised without double quantisation, 4 linear layers in 16 bits"
    )
    layers = load_base(config.model, helpers.CPU).model.layers
    assert type(layers[1].mlp.up_proj) is torch.nn.Linear and type(layers[0].self_attn.q_proj) is torch.nn.Linear
