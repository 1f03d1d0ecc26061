"""Models, adapters and templates from elsewhere: refused before anything in them can run or mislead, by name."""

import json
import pickle
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from workspace import make_workspace, run

from lowlevel.checkpoints.checkpoint import save_checkpoint, verify
from lowlevel.config.schema import ModelConfig
from lowlevel.data.tokenizer import chat_tokenizer
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.adapters import ADAPTER_CONFIG, WEIGHTS, read_adapter_config, read_adapter_weights
from lowlevel.model.base import empty_model, load_base, load_model_config
from lowlevel.model.build import build_policy
from lowlevel.model.files import MAX_JSON_BYTES, read_json_object
from lowlevel.model.merging import scaled_pairs
from lowlevel.model.placement import Placement

MODEL = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"
SHARD = "model-00001-of-00001.safetensors"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def change_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, **keys) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture(scope="module")
def good_adapter(tiny_base, tmp_path_factory) -> Path:
    return helpers.save_random_adapter(tiny_base, tmp_path_factory.mktemp("adapter") / "good")


@pytest.fixture
def adapter(good_adapter, tmp_path) -> Path:
    return Path(shutil.copytree(good_adapter, tmp_path / "adapter"))


def load(base: Path, **keys):
    return load_base(ModelConfig(name=str(base), **{"load_in_4bit": False, **keys}), helpers.CPU)


def refusal(call, *args, kind=CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_a_pickle_is_refused_by_its_name_and_never_opened(base, adapter, tmp_path, suffix):
    target = tmp_path / "opened"
    for folder, file in ((base, MODEL), (adapter, WEIGHTS)):
        (folder / file).unlink()
        (folder / f"weights{suffix}").write_bytes(pickle.dumps(Payload(target)))
    assert f"weights{suffix} is a pickle" in refusal(load, base)
    assert f"weights{suffix} is a pickle" in refusal(read_adapter_weights, adapter)
    (base / MODEL).write_bytes(pickle.dumps(Payload(target)))
    (adapter / WEIGHTS).write_bytes(pickle.dumps(Payload(target)))
    assert f"{MODEL} is damaged or cut" in refusal(load, base)
    assert f"{WEIGHTS} cannot be read" in refusal(read_adapter_weights, adapter)
    assert not target.exists()
    pickle.loads(pickle.dumps(Payload(target)))
    assert target.exists()


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, lambda new: (new / "a.safetensors").write_bytes(b"x"), {}, keep=2)
    verify(folder)
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Payload(tmp_path / "opened")))
    assert "files differ: optimizer.pt" in refusal(verify, folder)
    named = save_checkpoint(tmp_path, 2, lambda new: (new / "state.pkl").write_bytes(b"x"), {}, keep=2)
    assert "'state.pkl' is not a plain file name" in refusal(verify, named)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"1 tensors missing: {Q}"),
        (lambda t: t.update({"model.more": torch.ones(2)}), "1 tensors left over: model.more"),
        (lambda t: t.update({Q: t[Q][:-1].clone()}), f"1 tensors of another shape: {Q}"),
        (lambda t: t.update({Q: t[Q].to(torch.int64)}), f"1 tensor not floating-point: {Q} (I64)"),
        (lambda t: [t.pop(name) for name in sorted(t) if "layers.1" in name], "9 tensors missing: "),
    ],
)
def test_a_base_with_other_tensors(base, change, message):
    change_tensors(base / MODEL, change)
    said = refusal(load, base)
    assert message in said
    assert said.count("model.layers.1") <= 5


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_base_that_is_not_finite(base, quantised, value):
    names = sorted(load_file(base / MODEL))[:6]

    def spoil(tensors):
        for name in names:
            tensors[name].view(-1)[3] = value

    change_tensors(base / MODEL, spoil)
    said = refusal(lambda: load(base, load_in_4bit=quantised))
    assert f"{MODEL}: 6 tensors not finite: {', '.join(names[:5])}" in said and names[5] not in said


@pytest.mark.parametrize(
    "keys", [{}, {"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}]
)
@pytest.mark.parametrize("name", [Q, "lm_head.weight", "model.norm.weight"])
def test_a_weight_that_overflows_in_the_runs_precision(base, name, keys):
    change_tensors(base / MODEL, lambda t: t[name].view(-1)[-1:].fill_(1e5))
    load(base, **keys)
    config = ModelConfig(name=str(base), **{"load_in_4bit": False, **keys})
    said = refusal(load_base, config, Placement(torch.device("cpu"), "fp16"))
    assert f"base {str(base)!r}: 1 tensor not finite in float16: {name}" in said


def test_a_run_on_a_base_that_is_not_finite_ends_with_the_tensors_name(tmp_path):
    space = make_workspace(tmp_path)
    change_tensors(space.base / MODEL, lambda t: t[Q].view(-1)[:1].fill_(torch.nan))
    said = run("sft", space.write("run", "sft"))
    assert said.code == 4 and f"1 tensor not finite: {Q}" in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("kept", [0, 50, -9])
def test_a_cut_base(base, kept):
    (base / MODEL).write_bytes((base / MODEL).read_bytes()[:kept])
    assert f"{MODEL} is damaged or cut" in refusal(load, base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-00002-of-00002.safetensors", "1 of 2 shards missing: model-00002-of-00002.safetensors"),
        (f"../base/{SHARD}", f"names '../base/{SHARD}': shards are plain names"),
        ("/etc/passwd", "names '/etc/passwd': shards are plain names"),
        ("pytorch_model.bin", "names 'pytorch_model.bin': shards are plain names"),
        (None, "weight_map is not a table of file names"),
    ],
)
def test_an_index_names_files_of_its_own_folder_alone(base, name, message):
    names = dict.fromkeys(load_file(base / MODEL), SHARD)
    (base / MODEL).rename(base / SHARD)
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert load(base).config.vocab_size == helpers.VOCABULARY
    index.write_text(json.dumps({"metadata": {}, "weight_map": names | {Q: name}}))
    assert message in refusal(load, base)


@pytest.mark.parametrize("keys", [{"vocab_size": "many"}, {"hidden_size": -1}, {"model_type": "nope"}])
def test_a_configuration_that_no_model_has(base, keys):
    change_json(base / "config.json", **keys)
    refusal(load_model_config, ModelConfig(name=str(base)), kind=ConfigError)


def test_a_model_that_is_no_decoder(base):
    change_json(base / "config.json", model_type="t5")
    config = load_model_config(ModelConfig(name=str(base)))
    assert "cannot be trained as a decoder" in refusal(empty_model, config, kind=ConfigError)


def test_code_in_a_model_folder_is_not_run(base, tmp_path):
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change_json(base / "config.json", auto_map={"AutoConfig": "code.C"}, model_type="nope")
    refusal(load_model_config, ModelConfig(name=str(base)), kind=ConfigError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 80 + "1" + "}" * 80, "nested deeper than 64 levels"),
        ("{", "cannot be read"),
        ('{"a": "' + "x" * MAX_JSON_BYTES + '"}', "more than 16,777,216"),
    ],
)
def test_json_from_elsewhere_is_bounded(base, adapter, content, message):
    for path, read in (
        (base / "config.json", lambda: load_model_config(ModelConfig(name=str(base)))),
        (adapter / ADAPTER_CONFIG, lambda: read_adapter_config(adapter)),
    ):
        path.write_text(content)
        assert message in refusal(read)
        assert message in refusal(read_json_object, path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": 5000}, "r = 5000"),
        ({"r": "4"}, "r = '4'"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": 0}, "lora_alpha = 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
        ({"lora_alpha": "8"}, "lora_alpha = '8'"),
        ({"lora_dropout": 1}, "lora_dropout = 1"),
        ({"target_modules": ["q_proj", 3]}, "target_modules = ['q_proj', 3]"),
        ({"target_modules": "("}, "target_modules = '('"),
        ({"use_rslora": 1}, "use_rslora = 1"),
        ({"use_dora": "yes"}, "use_dora = 'yes'"),
        ({"auto_map": {"AutoModel": "code.M"}}, "auto_map = "),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"base_model_name_or_path": "https://host/model"}, "base_model_name_or_path = 'https://host/model'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ],
)
def test_an_adapter_configuration_out_of_bounds(adapter, keys, message):
    read_adapter_config(adapter)
    change_json(adapter / ADAPTER_CONFIG, **keys)
    assert message in refusal(read_adapter_config, adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", kind) for kind in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 1)),
        ("init_lora_weights", "mica"),
        ("alora_invocation_tokens", [8]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 4}),
        ("velora_config", {"rank": 1}),
        ("exclude_modules", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("rank_pattern", {"q_proj": 8}),
        ("a key\nof PEFT 0.99", 0.5),
    ],
)
def test_a_key_that_may_change_what_an_adapter_computes_is_refused(adapter, key, value):
    change_json(adapter / ADAPTER_CONFIG, **{key: value})
    assert f"{repr(key)[1:-1]} = {value!r} is not supported" in refusal(read_adapter_config, adapter)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_whose_base_peft_changed_is_refused(tiny_base, tmp_path, kind):
    """Saved by PEFT: what PEFT computes with it needs a base from which the adapter's first weights were taken."""
    made = get_peft_model(load(tiny_base), PeftLoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=kind))
    made.save_pretrained(tmp_path)
    assert f"init_lora_weights = '{kind}'" in refusal(read_adapter_config, tmp_path)


# What PEFT 0.11.1 wrote, with the keys that later versions, TRL and Unsloth added behind it.
WRITTEN = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "some/base", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_dropout": 0.05,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    "use_dora": False, "use_rslora": False,
}  # fmt: skip
LATER = {
    "exclude_modules": None, "eva_config": None, "lora_bias": False, "corda_config": None, "use_qalora": False,
    "trainable_token_indices": None, "target_parameters": None, "qalora_group_size": 16, "peft_version": "0.18.0",
    "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False,
}  # fmt: skip
UNSLOTH = {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, "task_type": None}


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "eva", "orthogonal"])
@pytest.mark.parametrize("more", [{}, LATER, LATER | UNSLOTH, {"layers_pattern": [], "of_a_later_peft": None}])
def test_plain_adapters_of_every_peft_are_read(tmp_path, kind, more):
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(WRITTEN | more | {"init_lora_weights": kind}))
    config = read_adapter_config(tmp_path)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 16, 0.05)
    assert config.target_modules == {"q_proj", "v_proj"}


def test_what_this_peft_writes_of_a_plain_adapter_is_read(tmp_path):
    PeftLoraConfig(r=8, lora_alpha=4, target_modules=["q_proj"], use_rslora=True).save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path).use_rslora is True


def attach(base: Path, adapter: Path, role: str):
    lora = helpers.LoraConfig(r=4, lora_alpha=8)
    return build_policy(load(base), lora, helpers.CPU, seed=0, **{role: adapter})


@pytest.mark.parametrize("role", ["parent", "init_from"])
def test_an_adapter_that_does_not_fit(tiny_base, adapter, role):
    first = sorted(load_file(adapter / WEIGHTS))[0]
    change_json(adapter / ADAPTER_CONFIG, r=8)
    said = refusal(attach, tiny_base, adapter, role)
    assert "28 adapter tensors of another shape" in said and said.endswith("; was it trained on another base?")
    change_json(adapter / ADAPTER_CONFIG, r=4, target_modules=["nope"])
    assert "does not fit the base" in refusal(attach, tiny_base, adapter, role)
    change_json(adapter / ADAPTER_CONFIG, target_modules=["q_proj"])
    assert "24 adapter tensors left over" in refusal(attach, tiny_base, adapter, role)
    for change, message in (
        (lambda t: t.update({first: t[first].to(torch.int64)}), f"1 tensor not fp32, fp16 or bf16: {first}"),
        (lambda t: t.update({first: t[first].float().fill_(torch.nan)}), f"1 tensor not finite: {first}"),
    ):
        change_tensors(adapter / WEIGHTS, change)
        assert message in refusal(read_adapter_weights, adapter)


def test_a_rank_that_is_not_the_tensors_own_is_not_merged(adapter):
    assert len(scaled_pairs(adapter)) == 14
    change_json(adapter / ADAPTER_CONFIG, r=8)
    assert "has rank 4 and 4, adapter_config.json says r = 8" in refusal(scaled_pairs, adapter)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ ''['__cla' ~ 'ss__'].mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% for m in messages %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_breaks_out_or_never_ends_is_refused(tiny_base, template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    said = refusal(chat_tokenizer, tokenizer, template, kind=ConfigError)
    assert said.startswith("unusable chat template: ")
