"""An example of every key of the run file, and what a configuration says or refuses."""

from pathlib import Path

import pytest
import tomli_w
from pydantic import BaseModel

import lowlevel
from lowlevel.config.file import config_from_tables
from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError

PACKAGE = Path(lowlevel.__file__).parent

# A value other than the default for each key, and the other settings without which it would contradict something.
PREFERENCES = {"method": "dpo", "data": {"format": "orca"}}
KTO = {"method": "kto"}
REWARD = {"method": "reward"}
HOLDOUT = {"data": {"eval_source": "holdout", "eval_limit": 5}}
KEYS = {
    "model.name": ("some/base", {}),
    "model.revision": ("5e1f", {}),
    "model.load_in_4bit": (False, {}),
    "model.bnb_4bit_quant_type": ("fp4", {}),
    "model.bnb_4bit_use_double_quant": (False, {}),
    "model.attn_implementation": ("eager", {}),
    "model.embeddings_on_host": (True, {}),
    "model.adapter": ("out/sft", PREFERENCES),
    "model.adapter_mode": ("original", {**PREFERENCES, "model": {"adapter": "out/sft"}}),
    "lora.r": (8, {}),
    "lora.lora_alpha": (12.5, {}),
    "lora.lora_dropout": (0.25, {}),
    "lora.target_modules": (["q_proj", "v_proj"], {}),
    "lora.use_rslora": (True, {}),
    "lora.use_dora": (True, {}),
    "lora.loraplus_lr_ratio": (16.0, {}),
    "lora.init_lora_weights": ("loftq", {}),
    "lora.init_from": ("out/older", {}),
    "data.source": ("rows.jsonl", {}),
    "data.split": ("test_sft", {}),
    "data.sources": ([{"source": "a.jsonl", "weight": 0.7}, {"source": "b.jsonl", "weight": 0.3}], {}),
    "data.shuffle_seed": (42, {}),
    "data.limit": (3000, {}),
    "data.format": ("orca", {"method": "dpo"}),
    "data.columns": (["weight", "label"], {}),
    "data.weight_column": ("weight", {}),
    "data.filters": ([{"column": "score", "op": ">=", "value": 8}], {}),
    "data.chat_template_from": ("some/chat.jinja", {}),
    "data.template_date": ("2026-11-24", {}),
    "data.supervise": ("all", {}),
    "data.max_length": (64, {}),
    "data.max_prompt_length": (32, PREFERENCES),
    "data.packing": (False, {}),
    "data.on_bad_row": ("skip", {}),
    "data.eval_source": ("heldout.jsonl", {}),
    "data.eval_split": ("validation", {}),
    "data.eval_limit": (7, {"data": {"eval_source": "heldout.jsonl"}}),
    "train.output_dir": ("out/3", {}),  # text, though it could be read as something else
    "train.finetuning_type": ("full", {}),
    "train.per_device_train_batch_size": (1, {}),
    "train.gradient_accumulation_steps": (8, {}),
    "train.learning_rate": (1e-5, {}),
    "train.lr_scheduler_type": ("linear", {}),
    "train.warmup_ratio": (0.1, {}),
    "train.warmup_steps": (3, {}),
    "train.max_steps": (200, {}),
    "train.num_train_epochs": (2.5, {}),
    "train.optim": ("paged_adamw_8bit", {}),
    "train.weight_decay": (0.01, {}),
    "train.max_grad_norm": (0.5, {}),
    "train.precision": ("bf16", {}),
    "train.gradient_checkpointing": (False, {}),
    "train.execution": ("eager", {}),
    "train.recomputed_layers": (4, {}),
    "train.offload_activations": (True, {}),
    "train.micro_batch_positions": (2048, {}),
    "train.dequantize_once": (True, {}),
    "train.shard_base": (False, {}),
    "train.memory_budget": ("15GiB", {}),
    "train.deterministic": (True, {}),
    "train.seed": (7, {}),
    "train.data_order": ("sequential", {}),
    "train.logging_steps": (1, {}),
    "train.eval_steps": (4, HOLDOUT),
    "train.early_stopping_patience": (3, {**HOLDOUT, "train": {"eval_steps": 2}}),
    "train.save_steps": (50, {}),
    "train.save_total_limit": (5, {}),
    "train.ddp_timeout": (30, {}),
    "train.report_to": (["tensorboard"], {}),
    "sft.loss_type": ("mine:loss", {}),
    "sft.loss_kwargs": ({"gamma": 0.5}, {}),
    "sft.label_smoothing": (0.2, {}),
    "sft.z_loss_weight": (1e-4, {}),
    "dpo.loss_type": ("ipo", PREFERENCES),
    "dpo.loss_kwargs": ({"gamma": 0.5}, PREFERENCES),
    "dpo.beta": (0.5, PREFERENCES),
    "dpo.label_smoothing": (0.1, PREFERENCES),
    "dpo.discopop_tau": (0.05, PREFERENCES),
    "dpo.dpop_lambda": (50.0, PREFERENCES),
    "dpo.rpo_alpha": (1.0, PREFERENCES),
    "dpo.f_alpha": (0.7, PREFERENCES),
    "dpo.ld_alpha": (0.7, PREFERENCES),
    "dpo.odpo_alpha": (0.5, PREFERENCES),
    "dpo.simpo_gamma": (0.5, PREFERENCES),
    "dpo.orpo_lambda": (0.2, PREFERENCES),
    "dpo.cpo_alpha": (0.5, PREFERENCES),
    "dpo.disable_dropout": (False, PREFERENCES),
    "dpo.ref_model_sync_steps": (64, PREFERENCES),
    "dpo.ref_model_mixup_alpha": (0.5, {**PREFERENCES, "dpo": {"ref_model_sync_steps": 64}}),
    "dpo.reference_cache": ("out/reference", PREFERENCES),
    "kto.beta": (0.2, KTO),
    "kto.desirable_weight": (1.5, KTO),
    "kto.undesirable_weight": (0.5, KTO),
    "kto.disable_dropout": (False, KTO),
    "reward.center_rewards_coefficient": (0.01, REWARD),
    "reward.disable_dropout": (False, REWARD),
    "grpo.loss_type": ("grpo", {"method": "grpo"}),
    "grpo.loss_kwargs": ({"gamma": 0.5}, {"method": "grpo"}),
    "grpo.num_generations": (4, {"method": "grpo"}),
    "grpo.max_completion_length": (64, {"method": "grpo"}),
    "grpo.temperature": (0.7, {"method": "grpo"}),
    "grpo.reward": (["gsm8k", "length"], {"method": "grpo"}),
    "grpo.reward_weights": ([0.5], {"method": "grpo"}),
    "grpo.reward_pattern": ("a.*", {"method": "grpo", "grpo": {"reward": ["format"], "reward_pattern": "b"}}),
    "grpo.reward_timeout": (5.0, {"method": "grpo"}),
    "grpo.mask_truncated_completions": (True, {"method": "grpo"}),
    "grpo.num_iterations": (2, {"method": "grpo"}),
    "grpo.beta": (0.05, {"method": "grpo"}),
    "grpo.epsilon": (0.1, {"method": "grpo"}),
    "grpo.epsilon_high": (0.3, {"method": "grpo"}),
    "grpo.delta": (3.0, {"method": "grpo"}),
    "grpo.importance_sampling_level": ("sequence", {"method": "grpo"}),
    "grpo.scale_rewards": ("group", {"method": "grpo"}),
    "grpo.kl_estimator": ("k2", {"method": "grpo", "grpo": {"beta": 0.1}}),
    "rloo.loss_type": ("mine:loss", {"method": "rloo"}),
    "rloo.loss_kwargs": ({"gamma": 0.5}, {"method": "rloo"}),
    "rloo.num_generations": (4, {"method": "rloo"}),
    "rloo.max_completion_length": (64, {"method": "rloo"}),
    "rloo.temperature": (0.7, {"method": "rloo"}),
    "rloo.reward": (["gsm8k", "length"], {"method": "rloo"}),
    "rloo.reward_weights": ([0.5], {"method": "rloo"}),
    "rloo.reward_pattern": ("a.*", {"method": "rloo", "rloo": {"reward": ["format"], "reward_pattern": "b"}}),
    "rloo.reward_timeout": (5.0, {"method": "rloo"}),
    "rloo.mask_truncated_completions": (True, {"method": "rloo"}),
    "rloo.num_iterations": (2, {"method": "rloo"}),
    "rloo.beta": (0.05, {"method": "rloo"}),
    "rloo.epsilon": (0.1, {"method": "rloo"}),
    "rloo.epsilon_high": (0.3, {"method": "rloo"}),
    "ppo.loss_type": ("mine:loss", {"method": "ppo"}),
    "ppo.loss_kwargs": ({"gamma": 0.5}, {"method": "ppo"}),
    "ppo.num_generations": (4, {"method": "ppo"}),
    "ppo.max_completion_length": (64, {"method": "ppo"}),
    "ppo.temperature": (0.7, {"method": "ppo"}),
    "ppo.reward": (["gsm8k", "length"], {"method": "ppo"}),
    "ppo.reward_weights": ([0.5], {"method": "ppo"}),
    "ppo.reward_pattern": ("a.*", {"method": "ppo", "ppo": {"reward": ["format"], "reward_pattern": "b"}}),
    "ppo.reward_timeout": (5.0, {"method": "ppo"}),
    "ppo.mask_truncated_completions": (True, {"method": "ppo"}),
    "ppo.num_iterations": (2, {"method": "ppo"}),
    "ppo.beta": (0.05, {"method": "ppo"}),
    "ppo.cliprange": (0.1, {"method": "ppo"}),
    "ppo.cliprange_value": (0.3, {"method": "ppo"}),
    "ppo.vf_coef": (0.5, {"method": "ppo"}),
    "ppo.gamma": (0.9, {"method": "ppo"}),
    "ppo.lam": (0.9, {"method": "ppo"}),
    "ppo.whiten_advantages": (False, {"method": "ppo"}),
    "online_dpo.loss_type": ("ipo", {"method": "online_dpo"}),
    "online_dpo.loss_kwargs": ({"gamma": 0.5}, {"method": "online_dpo"}),
    "online_dpo.num_generations": (4, {"method": "online_dpo"}),
    "online_dpo.max_completion_length": (64, {"method": "online_dpo"}),
    "online_dpo.temperature": (0.7, {"method": "online_dpo"}),
    "online_dpo.reward": (["gsm8k", "length"], {"method": "online_dpo"}),
    "online_dpo.reward_weights": ([0.5], {"method": "online_dpo"}),
    "online_dpo.reward_pattern": (
        "a.*",
        {"method": "online_dpo", "online_dpo": {"reward": ["format"], "reward_pattern": "b"}},
    ),
    "online_dpo.reward_timeout": (5.0, {"method": "online_dpo"}),
    "online_dpo.mask_truncated_completions": (True, {"method": "online_dpo"}),
    "online_dpo.num_iterations": (2, {"method": "online_dpo"}),
    "online_dpo.beta": (0.05, {"method": "online_dpo"}),
    "trace.every": (5, {}),
    "trace.steps": ([1, 8], {}),
    "trace.level": ("token", {"trace": {"every": 1}}),
    "trace.gradients": (True, {"trace": {"every": 1}}),
}


def merged(*parts: dict) -> dict:
    """Tables of tables, later ones over earlier ones."""
    tables: dict = {}
    for part in parts:
        for section, value in part.items():
            tables[section] = {**tables.get(section, {}), **value} if isinstance(value, dict) else value
    return tables


def write(folder: Path, tables: dict) -> Path:
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def value_of(config: RunConfig, key: str) -> object:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if isinstance(value, tuple):
        value = [item.model_dump(exclude_unset=True) if isinstance(item, BaseModel) else item for item in value]
    return value


def refused(tables: dict) -> list[str]:
    """The lines that these tables give."""
    with pytest.raises(ConfigError) as caught:
        config_from_tables(tables, "run.toml")
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()
