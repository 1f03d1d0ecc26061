"""Loading what a run made: its base with the adapters of every stage, or any model that can reply."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowlevel.config import LoraConfig, ModelConfig, RunConfig
from lowlevel.data.rendering import ChatTokenizer, load_chat_tokenizer
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.method import Method
from lowlevel.model.adapters import ADAPTER_CONFIG, adapter_sha256, build_policy, read_adapter_config
from lowlevel.model.attention_choice import choose_attention
from lowlevel.model.base import base_sha256, load_base, load_model_config, resolve_name
from lowlevel.model.files import read_json_object
from lowlevel.model.placement import Placement, choose_placement, dtype_name
from lowlevel.model.policy import Policy
from lowlevel.running.adapter_sources import find_adapter
from lowlevel.running.assembly import build_method, load_run_tokenizer
from lowlevel.running.run_folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stage:
    """One point of the chain base -> SFT -> DPO, as the adapters that are active in it."""

    name: str
    parent: bool
    trained: bool


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready for forward passes. `policy.activate` switches between its stages."""

    folder: RunFolder
    config: RunConfig
    tokenizer: ChatTokenizer
    policy: Policy
    method: Method
    stages: tuple[Stage, ...]

    def activate(self, stage: Stage) -> None:
        """Make the model that of a stage."""
        self.policy.activate(parent=stage.parent, trained=stage.trained)


def load_run(run_dir: Path, *, adapter: Path | None = None, initial: bool = False) -> LoadedRun:
    """Load a finished run's base and adapters as they were trained.

    Args:
        run_dir: the run folder.
        adapter: one of its checkpoints, in the place of the final adapter.
        initial: the adapter as the run began, before its first step, in the place of either.

    Raises:
        ConfigError: not a run folder, or not finished.
        CheckpointError: base or parent adapter are not those that the run trained on.
    """
    folder = RunFolder(run_dir)
    config = folder.read_config()
    manifest = folder.read_manifest()
    trained = find_adapter(config.lora.init_from, "lora.init_from") if initial else adapter or folder.adapter
    if trained and not trained.exists():
        raise ConfigError(f"{run_dir} has no adapter yet; has the run finished?")
    parent = folder.parent if folder.parent.exists() else None
    if parent and adapter_sha256(parent) != manifest["parent_adapter"]:
        raise CheckpointError(f"{parent}: not the adapter that this run stands on (its hash is not the manifest's)")
    placement = _placement(config.train.precision)
    tokenizer = load_run_tokenizer(config)
    attention = choose_attention(config.model, load_model_config(config.model), placement)
    base = load_base(config.model, placement, attention=attention.implementation)
    if dtype_name(placement.dtype) == manifest["base"]["dtype"]:
        found = base_sha256(base)
        if found != manifest["base"]["sha256"]:
            raise CheckpointError(
                f"{run_dir}: base {config.model.name!r} is not the one that was trained on (hash {found[:12]})"
            )
    policy = build_policy(
        base,
        config.lora,
        placement,
        seed=config.train.seed,
        parent=parent,
        init_from=trained,
        gradient_checkpointing=False,
        attention=attention,
    )
    policy.model.eval()
    stages = [Stage("base", False, False)]
    if parent:
        stages.append(Stage("sft", True, False))
    stages.append(Stage(config.method, True, True))
    return LoadedRun(folder, config, tokenizer, policy, build_method(config, attention), tuple(stages))


def _placement(precision: str) -> Placement:
    """The run's own precision, or this machine's where it has not got that: a run may move to another machine."""
    try:
        return choose_placement(precision)
    except ConfigError:
        return choose_placement("auto")


def load_for_replies(model_dir: Path) -> tuple[PreTrainedModel | PeftModel, ChatTokenizer, Placement]:
    """A model that can reply, from a run folder, a PEFT adapter or a merged model.

    Raises:
        ConfigError: the folder is none of them.
    """
    if (model_dir / "config.toml").exists():
        run = load_run(model_dir)
        return run.policy.model, run.tokenizer, run.policy.placement
    if (model_dir / ADAPTER_CONFIG).exists():
        if (model_dir.parent / "config.toml").exists():
            return _load_adapter_of_run(model_dir)
        return _load_adapter_alone(model_dir)
    if not (model_dir / "config.json").exists():
        raise ConfigError(
            f"{model_dir} is no run folder, PEFT adapter or model (config.toml, {ADAPTER_CONFIG}, config.json)"
        )
    placement = choose_placement("auto")
    model = load_base(ModelConfig(name=str(model_dir), load_in_4bit=False), placement)
    model.eval()
    return model, load_chat_tokenizer(str(model_dir), None, None), placement


def _load_adapter_of_run(adapter: Path) -> tuple[PreTrainedModel | PeftModel, ChatTokenizer, Placement]:
    """An adapter inside a run folder: the final one (also as stacked/), a checkpoint's, or the parent alone."""
    folder = RunFolder(adapter.parent)
    run = load_run(folder.path, adapter=adapter if adapter.name.startswith("step-") else None)
    if adapter.name == folder.parent.name:
        run.policy.activate(parent=True, trained=False)
    return run.policy.model, run.tokenizer, run.policy.placement


def _load_adapter_alone(adapter: Path) -> tuple[PreTrainedModel | PeftModel, ChatTokenizer, Placement]:
    """An adapter from elsewhere, on its base in 4 bits (nf4, double quantisation), as QLoRA trains it."""
    read_adapter_config(adapter)
    name = read_json_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{adapter}/{ADAPTER_CONFIG} names no base model")
    placement = choose_placement("auto")
    base = load_base(ModelConfig(name=name), placement)
    policy = build_policy(base, LoraConfig(), placement, seed=0, init_from=adapter, gradient_checkpointing=False)
    policy.model.eval()
    return policy.model, load_chat_tokenizer(resolve_name(name), None, None), placement
