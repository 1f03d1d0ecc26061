"""Loading the frozen base: quantised to 4 bits or not, checked tensor by tensor, and hashed."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from lowlevel.config.schema import ModelConfig
from lowlevel.demo import DEMO_BASE
from lowlevel.errors import CheckpointError, ConfigError, one_line, quoted
from lowlevel.model.attention_choice import register
from lowlevel.model.base_checks import check_finite, check_loading, check_quantised_layers
from lowlevel.model.base_folder import NO_ADAPTER, check_is_model, note_of_adapter, refuse_adapter
from lowlevel.model.files import check_weight_files, read_json_object, refuse_no_weights, refuse_pickles
from lowlevel.model.linear import install_dequantising_products, quantised_states
from lowlevel.model.placement import Placement
from lowlevel.model.policy import Policy, is_base
from lowlevel.model.quantisation import StoredQuantisation, check_kinds, check_stored, stored_quantisation, to_precision
from lowlevel.model.sharding import join_layers, sharded_when_loaded
from lowlevel.ranks import Ranks, here

# Logit transforms that are missing in `hidden @ lm_head.T`: Gemma 2, Cohere, Granite.
OUTPUT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
DTYPES = ("float32", "float16", "bfloat16", "float64")  # in config.json
_config_of_hub = cache(AutoConfig.from_pretrained)  # transformers 5.23 asks the hub each time, also for files on disk


def resolve_name(name: str) -> str:
    """The model name for transformers; "demo" is the base in this package."""
    return str(DEMO_BASE) if name == "demo" else name


def base_location(name: str) -> str:
    """The model name; for a local folder its absolute path, valid in every working folder."""
    folder = Path(resolve_name(name))
    return str(folder.resolve()) if folder.exists() else name


def public_name(name: str) -> str:
    """A model name or data source without local paths: for a file or folder only its last part."""
    return Path(name).name if Path(name).exists() else name


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The base's own configuration (config.json), without its weights.

    Raises:
        CheckpointError: pickles, or a config.json that is too large or not a JSON object.
        ConfigError: it cannot be read, is an adapter or a run, the model transforms its logits, or its weights are
            quantised in a way that cannot be trained.
    """
    name = resolve_name(config.name)
    check_is_model(name)
    refuse_pickles(Path(name), "model.name")
    if (Path(name) / "config.json").is_file():  # transformers cannot read other dtypes, or no weights have them
        found = read_json_object(Path(name) / "config.json")
        dtype = found.get("dtype", found.get("torch_dtype"))
        if dtype not in (None, *DTYPES):
            problem = f"config.json says dtype = {quoted(repr(dtype))}, expected {', '.join(DTYPES)}"
            raise ConfigError(f"model.name {config.name!r}: {problem}")
    try:
        read = AutoConfig.from_pretrained if Path(name).is_dir() else _config_of_hub
        loaded = deepcopy(read(name, revision=config.revision, trust_remote_code=False))
    except Exception as error:  # transformers, huggingface_hub and httpx each raise their own kinds here
        refuse_adapter(name, config.revision)
        raise ConfigError(f"model.name {config.name!r} cannot be read: {one_line(error)}") from None
    if loaded.get_text_config() is not loaded:
        what = f"({loaded.model_type}) reads more than text"
        raise ConfigError(
            f"model.name {config.name!r} {what}; only a text decoder in a folder of its own can be trained"
        )
    settings = loaded.to_dict()
    transforms = [key for key in OUTPUT_TRANSFORMS if settings.get(key) not in (None, 1, 1.0)]
    if transforms:
        raise ConfigError(f"model.name {config.name!r} rescales its logits ({transforms[0]}): no loss here does so")
    stored_quantisation(loaded, config.name)
    return loaded


def load_stored(config: ModelConfig) -> StoredQuantisation | None:
    """How the base's folder is quantised, from its config.json and the names of its weights; None: not.

    Raises ConfigError: in a way that cannot be trained, or config.json does not agree with the weights.
    """
    stored = stored_quantisation(load_model_config(config), config.name)
    check_stored(stored, Path(resolve_name(config.name)), config.name)
    return stored


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The base's modules without memory for their weights. Raises ConfigError if it is not a decoder."""
    try:
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"model.name: cannot be trained as a decoder: {one_line(error)}") from None


def describe_base(config: ModelConfig) -> str:
    """How the base is quantised, in words for people."""
    base = load_model_config(config)
    stored = stored_quantisation(base, config.name)
    if not stored:
        return f"4-bit {config.bnb_4bit_quant_type} base" if config.load_in_4bit else "unquantised base"
    left = len(stored.unquantised(empty_model(base))) if stored.skipped else 0
    return f"4-bit {stored.in_words()}" + (f", {left} linear layers in 16 bits" if left else "")


def load_base(
    config: ModelConfig,
    placement: Placement,
    *,
    attention: str | None = None,
    dtype: Literal["auto"] | None = None,
    shards: Ranks | None = None,
) -> PreTrainedModel:
    """Load the frozen base onto the device.

    Quantised linear layers compute in the placement's dtype; all other weights are stored in it, or in `dtype` ("auto":
    the file's). A pre-quantised folder stays as it is quantised, whatever `config` says. `attention` None: sdpa if the
    architecture supports it, otherwise eager. `shards`: the ranks that divide its layers among them (sharding.py).

    Raises:
        ConfigError: as `load_stored`.
        CheckpointError: a tensor is missing, unexpected, of another shape, or not finite (before or after the cast).
    """
    register()
    stored = load_stored(config)
    refuse_no_weights(Path(resolve_name(config.name)))
    check_weight_files(Path(resolve_name(config.name)), quantised=stored is not None)
    kept: Any = empty_model(load_model_config(config))._get_dtype_plan(placement.dtype) if stored else ()  # in fp32

    def prepare(part: nn.Module) -> None:
        if stored:
            to_precision(part, placement.dtype, None if dtype else placement.dtype, kept)

    with sharded_when_loaded(shards, prepare) if shards else nullcontext():
        model, info = _from_pretrained(config, placement, attention, dtype or placement.dtype, stored is not None)
    check_loading(config.name, info)
    check_quantised_layers(config.name, model, placement.device)
    if stored:
        check_kinds(model, stored, config.name)
    prepare(model)
    check_finite(config.name, model)
    _freeze(model)
    # If the LM head is the file's own, transformers 5.23 uses it but keeps "tied", and a merged model whose config.json
    # says so would lose its head in tools that believe it.
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    install_dequantising_products(model)
    if shards:
        join_layers(model, shards)
    return model


def _from_pretrained(
    config: ModelConfig, placement: Placement, attention: str | None, dtype: Any, stored: bool
) -> tuple[Any, dict[str, Any]]:
    """The base as transformers loads it, quantised meanwhile unless it is `stored` so; and what it says about names."""
    quantisation = {}  # transformers 5.23 takes `quantization_config=None` for "ignore that the folder is quantised"
    if config.load_in_4bit and not stored:
        quantisation["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=placement.dtype,
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_name(config.name),
            revision=config.revision,
            dtype=dtype,
            device_map={"": placement.device},
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_loading refuses them, by name
            adapter_kwargs=NO_ADAPTER,
            **quantisation,
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"base {config.name!r} cannot be loaded: {one_line(error)}") from None
    model, info = loaded
    return model, info


def _freeze(model: Any) -> None:
    """Switch off gradients, dropout, the cache, and repacking of weights."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, bnb.nn.Linear4bit):
            # bitsandbytes 0.50 on CPUs with AVX512-BF16: in eval mode it repacks the weights and computes in bf16.
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    model.config.attention_dropout = 0.0


def notes_of_base(config: ModelConfig, loaded: PretrainedConfig) -> list[str]:
    """A line for each thing in the base's folder that is used otherwise than it says. `loaded`: of `load_base`."""
    notes = note_of_adapter(config, resolve_name(config.name))
    if load_model_config(config).tie_word_embeddings and not loaded.tie_word_embeddings:
        notes.append(
            f"{config.name}: config.json says tie_word_embeddings = true, but its files hold another LM head, which is "
            "used; a merged model says false"
        )
    return notes


def base_sha256(model: nn.Module) -> str:
    """SHA-256 over every frozen weight and quantisation constant of the base, by name (without adapters)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(model).items()):
        data = here(tensor, whole=True).detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(data.data)
    return digest.hexdigest()


def policy_sha256(policy: Policy) -> str:
    """`base_sha256` of the base that a policy was built from."""
    return policy.untrained.sha256 if policy.untrained else base_sha256(policy.model)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    states = quantised_states(model)
    for name, parameter in model.named_parameters():
        if not is_base(name):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        tensors[plain] = parameter
        if name in states:
            state = states[name].as_dict(packed=True)
            tensors.update({f"{plain}.{key}": value for key, value in state.items()})
    return tensors
