"""Adapters in PEFT's own format: reading, checking and writing them.

After full fine-tuning the trained weights are the whole model: the same functions read and write a model's folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowlevel.config.schema import MAX_ALPHA, MAX_RANK
from lowlevel.errors import CheckpointError, how_many, quoted
from lowlevel.model.files import is_finite, read_json_object, refuse_pickles
from lowlevel.model.policy import SCORE, TRAINED, VALUE, AnyModel
from lowlevel.model.targets import matched

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
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the adapter's initial values from the base; MiCA freezes B.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "modules_to_save": (["score"],),  # a reward model's head
}


def load_value_head(head: nn.Parameter, folder: Path) -> None:
    """Copy the value head of a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        value = load_file(folder / VALUE_WEIGHTS)[VALUE]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder / VALUE_WEIGHTS} cannot be read: {error}") from None
    with torch.no_grad():
        head.copy_(value)


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
        raise CheckpointError(f"{path}: {how_many(len(odd), 'tensors')} not fp32, fp16 or bf16: {', '.join(odd[:5])}")
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise CheckpointError(f"{path}: {how_many(len(bad), 'tensors')} not finite: {', '.join(sorted(bad)[:5])}")
    return tensors


def load_adapter_weights(model: AnyModel, adapter: str, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into an adapter. Raises CheckpointError if names or shapes differ (PEFT 0.21 only warns)."""
    own, buffers = adapter_parameters(model, adapter), dict(model.named_buffers())
    tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    kind, ask = ("adapter ", "; was it trained on another base?") if isinstance(model, PeftModel) else ("", "")
    for what, names in (("missing", own.keys() - tensors.keys()), ("left over", tensors.keys() - own.keys())):
        if names:
            whole = what == "left over" and not any(".lora_" in name for name in names)
            hint = "; it also has whole layers, which are not supported: merge it with PEFT and start there"
            shown = ", ".join(sorted(names)[:2])
            raise CheckpointError(f"{where}: {len(names)} {kind}tensors {what}: {shown}{hint if whole else ask}")
    wrong = sorted(name for name in own if own[name].shape != tensors[name].shape)
    if wrong:
        shapes = f"{tuple(tensors[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}"
        raise CheckpointError(f"{where}: {len(wrong)} {kind}tensors of another shape: {wrong[0]} {shapes}{ask}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def adapter_parameters(model: AnyModel, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters under the keys of PEFT's file format (without the adapter's name); or a whole model's."""
    if not isinstance(model, PeftModel):
        return dict(model.named_parameters())
    marker, vector = f".{adapter}.", ".lora_magnitude_vector"
    own = {name.replace(marker, "."): p for name, p in model.named_parameters() if ".lora_" in name and marker in name}
    own = {name.removesuffix(".weight") if vector in name else name: p for name, p in own.items()}
    heads = {name: p for name, p in model.named_parameters() if name == SCORE} if adapter == TRAINED else {}
    return own | heads


def adapter_tensors(model: AnyModel, adapter: str) -> dict[str, Tensor]:
    """Copies of `adapter_parameters` on the CPU."""
    return {k: p.detach().to("cpu", copy=True).contiguous() for k, p in adapter_parameters(model, adapter).items()}


def save_adapter(
    model: AnyModel, adapter: str, folder: Path, base_name: str, revision: str | None = None, *, start: str = DEFAULT
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
