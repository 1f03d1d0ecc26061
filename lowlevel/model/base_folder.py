"""What a path or repository holds that should hold a model: also an adapter, only an adapter, or a run."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import find_adapter_config_file

from lowlevel.config.schema import ModelConfig
from lowlevel.errors import ConfigError, quoted
from lowlevel.hub import offline_without_network
from lowlevel.model.files import folders_with, read_json_object, refuse_pointers

CONFIG, ADAPTER_CONFIG, RUN_CONFIG = "config.json", "adapter_config.json", "config.toml"
RESULT = "model"  # of full fine-tuning, in a run folder
# transformers 5.23 also loads an adapter that it finds beside the weights: let it look where there is none.
NO_ADAPTER = {"subfolder": "no-adapter"}


def check_is_model(name: str) -> None:
    """Refuse what is no model's folder or hub name: a file, an address, an adapter, a run. Raises ConfigError."""
    folder = Path(name)
    if not folder.is_dir():
        return _check_name(name)
    refuse_pointers(folder)
    if (folder / CONFIG).is_file() and holds_model_weights(folder):
        return
    if (folder / RUN_CONFIG).is_file():
        if (folder / RESULT / CONFIG).is_file():
            raise ConfigError(f"model.name {name!r} is a run folder: its model is {folder / RESULT}")
        raise ConfigError(
            f"model.name {name!r} is a run folder: set model.name to that run's base and lora.init_from (dpo: or "
            "model.adapter) to the folder; or make it a model with lowlevel merge"
        )
    if not holds_model_weights(folder):
        refuse_adapter(name, None)
    if not (folder / CONFIG).is_file():
        for file, what in ((CONFIG, "a model"), (ADAPTER_CONFIG, "an adapter")):
            if found := folders_with(file, folder):
                inside = ", ".join(str(path.relative_to(folder)) for path in found[:5])
                raise ConfigError(f"model.name {name!r} has no {CONFIG}; in it, {inside} holds {what}: give its path")
        raise ConfigError(f"model.name {name!r} is a folder without {CONFIG}: give a model's folder or hub name")


def _check_name(name: str) -> None:
    """Raise ConfigError for a name that is no folder and cannot be one of the hub."""
    if Path(name).is_file():
        hint = "; GGUF cannot be trained: its original weights can" if name.lower().endswith(".gguf") else ""
        raise ConfigError(f"model.name {name!r} is a file; give a folder with {CONFIG} and *.safetensors{hint}")
    if address := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/@?#]+)", name):
        raise ConfigError(f'model.name {quoted(name)!r} is a web address: use the hub name "{address[1]}"')
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(f"model.name {quoted(name)!r}: no such folder") from None
    offline_without_network()


def holds_model_weights(folder: Path) -> bool:
    """Whether a folder holds a whole model's weights, in any format."""
    return any(not file.name.startswith("adapter_") for file in folder.glob("*.safetensors")) or any(
        folder.glob("pytorch_model*.bin")
    )


def refuse_adapter(name: str, revision: str | None) -> None:
    """Raise ConfigError if a folder or repository without a model holds an adapter."""
    path = find_adapter_config_file(name, revision=revision)
    if path is None:
        return
    base = read_json_object(Path(path)).get("base_model_name_or_path")
    known = f"for {quoted(repr(base))}" if base else f"for a base that its {ADAPTER_CONFIG} does not name"
    raise ConfigError(
        f"model.name {name!r} is an adapter {known}, not a model: set model.name to that base and lora.init_from (dpo: "
        "or model.adapter) to the adapter's folder"
    )


def note_of_adapter(config: ModelConfig, name: str) -> list[str]:
    """A line if an adapter lies beside the base's weights, which is not loaded. `name`: the resolved one."""
    if find_adapter_config_file(name, revision=config.revision) is None:
        return []
    return [
        f"{config.name} also holds an adapter ({ADAPTER_CONFIG}), which is not loaded: the base's own weights are "
        "used; to start from the adapter, set lora.init_from (dpo: or model.adapter) to its folder"
    ]
