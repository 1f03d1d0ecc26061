"""Adapters: attaching them to the base, stacking a frozen one, and reading and writing PEFT's own format.

After full fine-tuning the trained weights are the whole model: the same functions read and write a model's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowlevel.config.schema import MAX_ALPHA, MAX_RANK, LoraConfig, stands_alone
from lowlevel.errors import CheckpointError, ConfigError, one_line, quoted
from lowlevel.model.attention_choice import MASKED, Attention
from lowlevel.model.dropout import DropoutState
from lowlevel.model.files import is_finite, read_json_object, refuse_pickles
from lowlevel.model.layers import DecoderLayers
from lowlevel.model.linear import install_side_by_side, prepare_dora
from lowlevel.model.moving_reference import Following
from lowlevel.model.offload import HostInputs
from lowlevel.model.placement import Placement
from lowlevel.model.policy import (
    PARENT,
    REFERENCE,
    SCORE,
    TRAINED,
    VALUE,
    Policy,
    flatten,
    moving_reference,
    place_dropout,
)
from lowlevel.model.suitability import check_base
from lowlevel.model.targets import linear_layers, matched

WEIGHTS = "adapter_model.safetensors"
WHOLE = "model.safetensors"  # instead of WEIGHTS, after full fine-tuning
REFERENCE_WEIGHTS = "reference.safetensors"  # in checkpoints: a moving reference, with the names of WEIGHTS
VALUE_WEIGHTS = "value_head.safetensors"  # in checkpoints of ppo
ADAPTER_CONFIG = "adapter_config.json"
START, DEFAULT = "init_lora_weights", "default"  # in the metadata of WEIGHTS, unless it is the default
STORED = (torch.float32, torch.float16, torch.bfloat16)
# Keys of adapter_config.json. Every variant of LoRA adds one, so a key that is not listed must be null, false or empty.
OBEYED = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
CHECKED = ("peft_type", "base_model_name_or_path")
ABOUT = ("auto_mapping", "inference_mode", "peft_version", "revision", "task_type")  # the writer, PEFT's wrapper class
UNREAD = ("eva_config", "megatron_core", "qalora_group_size")  # before training; with megatron_config; with use_qalora
# Keys of [lora] that PEFT's LoraConfig lacks, or (init_lora_weights) reads otherwise: it would change the base.
NOT_PEFTS = {"init_from", "loraplus_lr_ratio", "init_lora_weights"}
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the adapter's initial values from the base; MiCA freezes B.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "modules_to_save": (["score"],),  # a reward model's head
}
HEAD_STD = 0.02  # of a new reward head, as transformers initialises it


def build_policy(
    base: PreTrainedModel,
    lora: LoraConfig,
    placement: Placement,
    *,
    seed: int,
    parent: Path | None = None,
    init_from: Path | None = None,
    gradient_checkpointing: bool = True,
    attention: Attention = MASKED,
    recomputed: int | None = None,
    offload: bool = False,
    following: Following | None = None,
    reward_head: bool = False,
    value_head: bool = False,
) -> Policy:
    """Attach the adapter to train to a base from `load_base`.

    Args:
        lora: size of the new adapter; with `init_from`, only its dropout.
        seed: of the new adapter's initialisation (A uniform, B zero: the policy starts equal to its reference).
        parent: PEFT folder of a frozen adapter that the trained one is stacked on.
        init_from: PEFT folder whose sizes and weights the trained adapter starts from.
        recomputed: with gradient checkpointing, how many layers are recomputed; None: all of them.
        offload: keep the inputs of these layers in host memory.
        following: give the policy a moving reference.
        value_head: also train a head that gives the value of a state, at first 0.
        reward_head: also train a head that gives a scalar, initialised by `seed` or from `init_from`.

    Raises:
        ConfigError: target modules that match no layer, or the LM head; an unsupported base.
        CheckpointError: an adapter folder that is damaged or does not fit.
    """
    # torch 2.11 prefers cuDNN's attention on an H100. With large scores its gradients are NaN for masked rows whose
    # length is not a multiple of 128 (benchmarks/attention_nan.py).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(seed)
    head = _new_head(base, seed, placement.device) if reward_head else None
    model = _attach(base, lora, parent, init_from, head, moving=following is not None)
    if value_head:
        model.get_base_model().value = _new_value_head(base, placement.device)
    layers = _prepared_layers(model, placement.dtype, fresh=init_from is None)
    state = DropoutState()
    place_dropout(layers, lora.lora_dropout, state, placement.device)
    trained = {name: p for name, p in model.named_parameters() if f".{TRAINED}." in name or name in (SCORE, VALUE)}
    flat = flatten(trained, lora.loraplus_lr_ratio)
    model.eval()  # no dropout or router noise in the base; the adapter's dropout only depends on its state
    host = HostInputs(placement.device) if offload else None
    decoder_layers = DecoderLayers(base, recomputed if gradient_checkpointing else 0, state, host)
    adapted, heads = tuple(layers.values()), (flat.views.get(SCORE), flat.views.get(VALUE))
    moving = moving_reference(model, flat, following) if following else None
    start = adapter_start(init_from) if init_from else lora.init_lora_weights
    policy = Policy(
        model, flat, placement, state, adapted, parent is not None, attention, decoder_layers, moving, start, *heads
    )
    policy.activate(parent=True, trained=True)
    if policy.value_head is not None and init_from and (init_from / VALUE_WEIGHTS).exists():
        load_value_head(policy.value_head, init_from)
    check_base(policy)
    return policy


def _prepared_layers(model: PeftModel, dtype: torch.dtype, *, fresh: bool) -> dict[str, LoraLayer]:
    """Give the adapted layers our products, and those with DoRA its row lengths; the layers by name."""
    install_side_by_side(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for layer in layers.values():
        if TRAINED in layer.lora_magnitude_vector:
            prepare_dora(layer, TRAINED, dtype, fresh=fresh)
    return layers


def _new_value_head(base: PreTrainedModel, device: torch.device) -> nn.Linear:
    head = nn.Linear(base.get_output_embeddings().weight.shape[1], 1, bias=False, device=device)
    nn.init.zeros_(head.weight)
    return head


def load_value_head(head: nn.Parameter, folder: Path) -> None:
    """Copy the value head of a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        value = load_file(folder / VALUE_WEIGHTS)[VALUE]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder / VALUE_WEIGHTS} cannot be read: {error}") from None
    with torch.no_grad():
        head.copy_(value)


def _new_head(base: PreTrainedModel, seed: int, device: torch.device) -> nn.Linear:
    """A reward head (1, D) in fp32, without a bias: it would cancel in r+ - r-."""
    head = nn.Linear(base.get_output_embeddings().weight.shape[1], 1, bias=False)
    nn.init.normal_(head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
    return head.to(device)


def _attach(
    base: PreTrainedModel,
    lora: LoraConfig,
    parent: Path | None,
    init_from: Path | None,
    head: nn.Linear | None,
    *,
    moving: bool,
) -> PeftModel:
    folder = init_from
    config, layers = read_adapter_config(init_from) if init_from else _new_config(base, lora), linear_layers(base)
    try:
        model: Any = get_peft_model(base, _expanded(config, layers), adapter_name=TRAINED, autocast_adapter_dtype=True)
        if moving:  # not before the trained one, whose random numbers must not change
            model.add_adapter(REFERENCE, _expanded(config, layers))
        if parent:
            folder = parent
            model.add_adapter(PARENT, _expanded(read_adapter_config(parent), layers))
    except ValueError as error:  # the folder's target modules match no layer; `_new_config` checks the others
        raise CheckpointError(f"{folder} does not fit the base: {one_line(error)}") from None
    if head is not None:
        model.get_base_model().score = head
    for adapter, source in ((TRAINED, init_from), (PARENT, parent)):
        if source:
            tensors = read_adapter_weights(source)
            if adapter == PARENT and not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name):
                raise CheckpointError(f"{source}: each lora_B is zero: it is untrained, or its values were not saved")
            if head is not None and adapter == TRAINED and not is_reward_model(source):  # an SFT adapter: a new head
                tensors[SCORE] = head.weight.detach()
            load_adapter_weights(model, adapter, tensors, str(source))
    return model


def _expanded(config: PeftLoraConfig, layers: Sequence[str]) -> PeftLoraConfig:
    """The same with the names of the layers that a pattern or "all-linear" matches; the saved adapter has the names."""
    targets = config.target_modules
    return replace(config, target_modules=matched(targets, layers)) if isinstance(targets, str) else config


def check_target_modules(base: nn.Module, targets: Sequence[str]) -> None:
    """Raise ConfigError if a name or pattern matches no linear layer, or the LM head; GPT-2 has no linear layers."""
    layers = linear_layers(base)
    if not layers:
        raise ConfigError(f"model.name: {type(base).__name__} is not supported: it has no linear layers to adapt")
    for target in targets:
        try:
            found = matched(targets if len(targets) == 1 else (target, target), layers)  # a pattern counts only alone
        except ValueError as error:
            raise ConfigError(f'lora.target_modules: "{quoted(target)}" {error}') from None
        if not found:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
            what = f'lora.target_modules: "{quoted(target)}" matches no layer'
            hint = "; a regular expression stands alone and matches the whole name" if stands_alone(target) else ""
            raise ConfigError(f"{what}; linear layers here: {known}{hint}")


def _new_config(base: nn.Module, lora: LoraConfig) -> PeftLoraConfig:
    check_target_modules(base, lora.target_modules)
    targets = list(lora.target_modules)
    alone = targets[0] if len(targets) == 1 and stands_alone(targets[0]) else targets
    settings = {**lora.model_dump(exclude=NOT_PEFTS), "target_modules": alone}
    return PeftLoraConfig(**settings, bias="none", task_type="CAUSAL_LM")


def read_adapter_config(folder: Path) -> PeftLoraConfig:
    """The LoRA configuration of a PEFT folder. Raises CheckpointError: not a LoRA adapter, or unsupported settings."""
    path = folder / ADAPTER_CONFIG
    try:
        raw = read_json_object(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no adapter ({ADAPTER_CONFIG} is missing)") from None
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r}, expected 'LORA'")
    _check_kind(raw, path)
    _check_settings(raw, path)
    return PeftLoraConfig(**{k: raw[k] for k in OBEYED if k in raw}, bias="none", task_type="CAUSAL_LM")


def is_reward_model(folder: Path) -> bool:
    """Whether a PEFT folder holds a reward head."""
    return bool(read_json_object(folder / ADAPTER_CONFIG).get("modules_to_save"))


def _check_kind(raw: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError unless each key is supported, has no effect, or is unset."""
    for key in sorted(raw.keys() - {*OBEYED, *CHECKED, *ABOUT, *UNREAD}):
        value, plain = raw[key], PLAIN.get(key, ())
        unused = value is None or value is False or value in ("", [], {})
        if not unused and not any(type(value) is type(one) and value == one for one in plain):
            expected = ", ".join([*(json.dumps(one) for one in plain), "null or false"])
            named = f"{quoted(repr(key)[1:-1])} = {quoted(repr(value))}"
            raise CheckpointError(f"{path}: {named} is not supported by this trainer, expected {expected}")


def _check_settings(raw: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError if a type is wrong or a value out of bounds."""
    r, alpha, dropout, targets = (raw.get(k) for k in ("r", "lora_alpha", "lora_dropout", "target_modules"))
    if not (_within(r, 1, MAX_RANK) and isinstance(r, int) and _within(alpha, 0, MAX_ALPHA) and alpha):
        values = f"r = {quoted(repr(r))}, lora_alpha = {quoted(repr(alpha))}"
        raise CheckpointError(f"{path}: {values} are out of bounds (r to {MAX_RANK:,}, lora_alpha to {MAX_ALPHA:,})")
    if not (dropout is None or _within(dropout, 0, 1) and dropout < 1):
        raise CheckpointError(f"{path}: lora_dropout = {quoted(repr(dropout))}, expected a number in [0, 1)")
    names = targets if isinstance(targets, list) else [targets]
    if not (names and all(isinstance(t, str) and t for t in names)):
        raise CheckpointError(f"{path}: target_modules = {quoted(repr(targets))}, expected names or a pattern")
    try:
        matched(targets or "", ())
    except ValueError as error:
        raise CheckpointError(f"{path}: target_modules = {quoted(repr(targets))} {error}") from None
    for switch in ("use_rslora", "use_dora"):
        if not isinstance(raw.get(switch, False), bool):
            raise CheckpointError(f"{path}: {switch} = {quoted(repr(raw[switch]))}, expected true or false")
    name = raw.get("base_model_name_or_path")
    if not (name is None or isinstance(name, str) and "://" not in name):
        raise CheckpointError(f"{path}: base_model_name_or_path = {quoted(repr(name))}, expected a name or a folder")


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def weights_file(folder: Path) -> str:
    """The file with a folder's trained weights: those of an adapter, also beside its base, or of a whole model."""
    return WHOLE if (folder / WHOLE).exists() and not (folder / WEIGHTS).exists() else WEIGHTS


def read_adapter_weights(folder: Path, file: str | None = None) -> dict[str, Tensor]:
    """Tensors of a PEFT folder by PEFT's keys. Raises CheckpointError: pickles, other dtypes, values not finite."""
    refuse_pickles(folder, "adapter")
    path = folder / (file or weights_file(folder))
    try:
        tensors = load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    odd = sorted(f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in STORED)
    if odd:
        raise CheckpointError(f"{path}: {len(odd)} tensors are not fp32, fp16 or bf16: {', '.join(odd[:5])}")
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise CheckpointError(f"{path}: {len(bad)} tensors are not finite: {', '.join(sorted(bad)[:5])}")
    return tensors


def load_adapter_weights(
    model: PeftModel | PreTrainedModel, adapter: str, tensors: dict[str, Tensor], where: str
) -> None:
    """Copy tensors into an adapter. Raises CheckpointError if names or shapes differ (PEFT 0.21 only warns)."""
    own, buffers = adapter_parameters(model, adapter), dict(model.named_buffers())
    tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    kind = "adapter " * isinstance(model, PeftModel)
    for what, names in (("missing", own.keys() - tensors.keys()), ("left over", tensors.keys() - own.keys())):
        if names:
            whole = what == "left over" and not any(".lora_" in name for name in names)
            hint = "; it also has whole layers, which are not supported: merge it with PEFT and start there" * whole
            shown = ", ".join(sorted(names)[:5])
            raise CheckpointError(f"{where}: {len(names)} {kind}tensors {what}: {shown}{hint}")
    wrong = sorted(name for name in own if own[name].shape != tensors[name].shape)
    if wrong:
        shapes = f"{tuple(tensors[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}"
        raise CheckpointError(f"{where}: {len(wrong)} {kind}tensors of another shape: {wrong[0]} {shapes}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def adapter_parameters(model: PeftModel | PreTrainedModel, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters under the keys of PEFT's file format (without the adapter's name); or a whole model's."""
    if not isinstance(model, PeftModel):
        return dict(model.named_parameters())
    marker, vector = f".{adapter}.", ".lora_magnitude_vector"
    own = {name.replace(marker, "."): p for name, p in model.named_parameters() if ".lora_" in name and marker in name}
    own = {name.removesuffix(".weight") if vector in name else name: p for name, p in own.items()}
    heads = {name: p for name, p in model.named_parameters() if name == SCORE} if adapter == TRAINED else {}
    return own | heads


def adapter_tensors(model: PeftModel | PreTrainedModel, adapter: str) -> dict[str, Tensor]:
    """Copies of `adapter_parameters` on the CPU."""
    return {k: p.detach().to("cpu", copy=True).contiguous() for k, p in adapter_parameters(model, adapter).items()}


def save_adapter(
    model: PeftModel | PreTrainedModel,
    adapter: str,
    folder: Path,
    base_name: str,
    revision: str | None = None,
    *,
    start: str = DEFAULT,
) -> None:
    """Write an adapter for `PeftModel.from_pretrained`: fp32 safetensors, and adapter_config.json naming its base.

    `start`: lora.init_lora_weights, for `adapter_start`. A model without adapters is written for its own
    `from_pretrained`, in fp32.
    """
    tensors = adapter_tensors(model, adapter)
    if not isinstance(model, PeftModel):
        settings = {**model.config.to_diff_dict(), "dtype": "float32", "use_cache": True}
        saved = model.state_dict().keys()  # includes buffers, such as the correction of a router
        tensors |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in saved}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    other: dict[str, Any] = {"base_model_name_or_path": base_name, "revision": revision}
    other |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if SCORE in tensors else {}
    write_adapter(folder, tensors, {**model.peft_config[adapter].to_dict(), **other}, start=start)


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, start: str = DEFAULT) -> None:
    """Write PEFT's two files. Raises TypeError before it writes, if JSON has no form for a setting."""
    settings = {key: _as_json(value) for key, value in {**config, "inference_mode": True}.items()}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    more = {} if start == DEFAULT else {START: start}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **more})
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def adapter_start(folder: Path) -> str:
    """The lora.init_lora_weights with which an adapter of a run started; "default" for adapters from elsewhere."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get(START, DEFAULT)
    except (OSError, SafetensorError):  # `read_adapter_weights` says what is wrong with it
        return DEFAULT


def _as_json(value: Any) -> Any:
    """A set as a list, an empty set as null: PEFT 0.21 has one in target_parameters of mixtures of experts."""
    return (sorted(value) or None) if isinstance(value, set) else value


def adapter_sha256(folder: Path) -> str:
    """SHA-256 of an adapter's (or whole model's) weight file."""
    with open(folder / weights_file(folder), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
