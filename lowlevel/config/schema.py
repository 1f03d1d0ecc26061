"""The configuration of a run: TOML sections as frozen models. Every key is also a flag (`--train.learning_rate 1e-4`).

Keys that transformers, PEFT or TRL have keep the same name. file.py reads and writes run files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lowlevel.config import METHODS
from lowlevel.config.data import DataConfig
from lowlevel.config.offline import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from lowlevel.config.online import GRPOConfig, OnlineDPOConfig, PPOConfig, RLOOConfig, SampledConfig
from lowlevel.config.section import (
    Above,
    Batch,
    Finite,
    Location,
    Names,
    Natural,
    NotNegative,
    OptionalLocation,
    Positive,
    Section,
    Seed,
    as_list,
)

MAX_RANK, MAX_ALPHA = 4096, 1_048_576  # of an adapter: trained here, or opened
ALL_LINEAR = "all-linear"
PAIRED = ("dpo", "reward", "online_dpo")  # methods whose example is a pair
ONLINE = ("grpo", "rloo", "ppo", "online_dpo")  # methods that sample the completions they train on
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stands_alone(target: str) -> bool:
    """Whether a target module is "all-linear" or a regular expression, and not a name."""
    return target.lower() == ALL_LINEAR or bool(re.search(r"[^\w.-]", target))


def _targets(value: Any) -> Any:
    """A text as a list: one pattern, or names between commas."""
    if not isinstance(value, str):
        return value
    names = re.split(r"[,\s]+", value.strip())
    return [value] if any(map(stands_alone, names)) else names


Targets = Annotated[Names, BeforeValidator(_targets)]
Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False), BeforeValidator(as_list)
]


class ModelConfig(Section):
    """The base model, its quantisation, and the adapter that DPO starts from."""

    name: Location = Field("demo", description='hub name, local folder, or "demo" (the built-in base)')
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    load_in_4bit: bool = Field(True, description="quantise the base's linear layers with bitsandbytes")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type")
    bnb_4bit_use_double_quant: bool = Field(True, description="also quantise the quantisation constants")
    attn_implementation: Literal["auto", "flash", "efficient", "sdpa", "eager"] = Field(
        "auto", description="attention kernel; auto: flash or efficient without a mask on a GPU, sdpa with one on a CPU"
    )
    embeddings_on_host: bool = Field(False, description="input embedding in host memory: less GPU memory, same numbers")
    adapter: OptionalLocation = Field(None, description="all but sft: run folder or PEFT folder to start from")
    adapter_mode: Literal["stack", "original", "none"] = Field(
        "stack",
        description="stack: freeze adapter under a new one; original: merge into 16-bit weights; none: no adapter",
    )


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): the update of a layer is lora_alpha / r * B A."""

    r: Annotated[int, Field(gt=0, le=MAX_RANK)] = Field(64, description="rank")
    lora_alpha: Annotated[Finite, Field(gt=0, le=MAX_ALPHA)] = Field(32, description="update scale is lora_alpha / r")
    lora_dropout: Annotated[Finite, Field(ge=0, lt=1)] = Field(0.1, description="dropout of the adapter's input")
    target_modules: Targets = Field(
        ALL_PROJECTIONS, min_length=1, description='linear layers with an adapter: names, "all-linear" or a pattern'
    )
    use_rslora: bool = Field(False, description="rsLoRA (arXiv 2312.03732): update scale is lora_alpha / sqrt(r)")
    use_dora: bool = Field(False, description="DoRA (arXiv 2402.09353): learn the length of each weight row apart")
    loraplus_lr_ratio: Above | None = Field(
        None, description="LoRA+ (arXiv 2402.12354): B learns at this times train.learning_rate; 16 is common"
    )
    init_lora_weights: Literal["default", "loftq"] = Field(
        "default", description="B starts as 0; loftq (sft, arXiv 2310.08659): from the base's quantisation error"
    )
    init_from: OptionalLocation = Field(None, description="run folder or PEFT adapter to continue training")


class TrainConfig(Section):
    """Optimisation, precision, logging and checkpoints."""

    output_dir: Location = Field("out/run", description="run folder")
    finetuning_type: Literal["lora", "full"] = Field(
        "lora", description="train an adapter on a frozen base, or (full) all weights of a base that is not quantised"
    )
    per_device_train_batch_size: Batch = Field(
        2, description="examples, pairs or sampled completions per micro-batch; with packing, its size in full rows"
    )
    gradient_accumulation_steps: Batch = Field(4, description="micro-batches of an optimizer step")
    learning_rate: Annotated[Finite, Field(gt=0, le=1)] = Field(2e-4, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="schedule after warm-up")
    warmup_ratio: Annotated[Finite, Field(ge=0, le=1)] = Field(0.0, description="share of the steps that warm up")
    warmup_steps: Natural = Field(0, description="steps that warm up; overrides warmup_ratio")
    max_steps: Positive | None = Field(None, description="optimizer steps; overrides num_train_epochs")
    num_train_epochs: Above = Field(1.0, description="passes over the training rows")
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw"] = Field("paged_adamw_32bit", description="AdamW")
    weight_decay: NotNegative = Field(0.0, description="decoupled weight decay")
    max_grad_norm: Above = Field(1.0, description="clip the gradient to this l2 norm")
    precision: Literal["auto", "fp16", "bf16", "fp32"] = Field("auto", description="auto: fp16 on CUDA, fp32 on a CPU")
    gradient_checkpointing: bool = Field(True, description="recompute activations in the backward pass")
    execution: Literal["auto", "eager", "compiled", "graphed"] = Field(
        "auto", description="run layers as they are, compiled, or in a CUDA graph; auto: the fastest on this machine"
    )
    recomputed_layers: Natural | None = Field(None, description="recompute only the first N layers; default: all")
    offload_activations: bool = Field(False, description="inputs of recomputed layers in host memory: less GPU memory")
    micro_batch_positions: Positive | None = Field(
        None, description="packed positions per micro-batch on a GPU; default: per_device_train_batch_size rows"
    )
    dequantize_once: bool | None = Field(
        None, description="dequantise the 4-bit weights once: 4 to 8 times their memory; default: on a CPU with room"
    )
    shard_base: bool | None = Field(None, description="GPUs share the base's layers; default: if one cannot hold them")
    memory_budget: str | None = Field(
        None,
        description='GPU memory ("15GiB"); sets recomputed_layers, micro_batch_positions, dequantize_once to fit it',
    )
    deterministic: bool = Field(False, description="same bits on every repetition, also on a GPU; may be slower")
    seed: Seed = Field(42, description="seed of adapter initialisation, dropout and data order")
    data_order: Literal["shuffled", "shuffled_pairs", "sequential"] = Field(
        "shuffled", description="order of the rows in an epoch; shuffled_pairs: kto's two rows of a pair in one step"
    )
    logging_steps: Positive = Field(10, description="steps between logged lines")
    eval_steps: Positive | None = Field(None, description="steps between evaluations; default: only at start and end")
    early_stopping_patience: Positive | None = Field(None, description="stop after N evaluations without a lower loss")
    save_steps: Positive | None = Field(None, description="steps between checkpoints; default: only at the end")
    save_total_limit: Positive = Field(2, description="checkpoints to keep")
    ddp_timeout: Positive = Field(120, description="seconds after which a GPU that others wait for counts as hung")
    report_to: Trackers = Field((), description="experiment trackers that get the logged numbers")


class TraceConfig(Section):
    """Records of single examples and steps, as parquet in the run folder's trace/ (lowlevel/tracing)."""

    every: Positive | None = Field(None, description="trace steps N, 2N, 3N, ...; default: none")
    steps: tuple[Positive, ...] = Field((), strict=False, description="trace these steps, counted from 1 as in the log")
    level: Literal["pair", "token"] = Field("pair", description="token: also ids and log-probabilities of each token")
    gradients: bool = Field(False, description="also gradient norms, in dpo also of the two terms, which takes longer")


class RunConfig(Section):
    """All settings of a run, from a TOML file and flags."""

    method: Literal["sft", "dpo", "kto", "reward", "grpo", "rloo", "ppo", "online_dpo"] = "sft"
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sft: SFTConfig = SFTConfig()
    dpo: DPOConfig = DPOConfig()
    kto: KTOConfig = KTOConfig()
    reward: RewardConfig = RewardConfig()
    grpo: GRPOConfig = GRPOConfig()
    rloo: RLOOConfig = RLOOConfig()
    ppo: PPOConfig = PPOConfig()
    online_dpo: OnlineDPOConfig = OnlineDPOConfig()
    trace: TraceConfig = TraceConfig()

    def changed(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with other values of some keys of these sections; values are not checked."""
        own = {name: getattr(self, name).model_copy(update=keys) for name, keys in sections.items()}
        return self.model_copy(update=own)

    @property
    def own(self) -> SFTConfig | DPOConfig | KTOConfig | RewardConfig | SampledConfig:
        """The section of the method."""
        own: SFTConfig | DPOConfig | KTOConfig | RewardConfig | SampledConfig = getattr(self, self.method)
        return own

    @property
    def sampled(self) -> SampledConfig | None:
        """The section of an online method; None for the others."""
        return self.own if isinstance(self.own, SampledConfig) else None

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with the policy without the trained adapter."""
        if self.sampled and self.method != "online_dpo":
            return self.sampled.beta > 0
        return self.method not in ("sft", "reward")

    @property
    def loss_line(self) -> str:
        """The loss and its main settings, in words."""
        if self.method == "kto":
            return f"beta {self.kto.beta:g}, weights {self.kto.desirable_weight:g} and {self.kto.undesirable_weight:g}"
        if self.method == "reward":
            return f"Bradley-Terry, centring {self.reward.center_rewards_coefficient:g}"
        if self.sampled:
            return self.sampled.line
        return f"loss {self.dpo.loss_type}, beta {self.dpo.beta:g}" if self.method == "dpo" else self.sft.loss_type

    @property
    def active_dropout(self) -> float:
        """Dropout of the policy's training pass."""
        return 0.0 if self.own.disable_dropout or self.full else self.lora.lora_dropout

    @property
    def full(self) -> bool:
        """Whether all weights are trained, and no adapter."""
        return self.train.finetuning_type == "full"

    @property
    def rows_per_step(self) -> int:
        """Examples of an optimizer step; of an online method completions (online_dpo: pairs)."""
        return self.train.per_device_train_batch_size * self.train.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        """Data rows of an optimizer step: each has one example, or an online method's group of completions."""
        return self.rows_per_step // self.sampled.group if self.sampled else self.rows_per_step

    @property
    def row_positions(self) -> int:
        """Most positions of an example; a pair needs them twice, for both completions."""
        return self.data.max_length * (2 if self.method in PAIRED else 1)


SECTIONS: dict[str, type[Section]] = {
    name: type(field.default) for name, field in RunConfig.model_fields.items() if name != "method"
}
# Defaults of a method that differ from those of sft. The recipe has 1e-5.
METHOD_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    method: {"train": {"learning_rate": rate}}
    for method, rate in (("dpo", 1e-5), ("kto", 1e-5), ("reward", 1e-4), *((method, 1e-5) for method in ONLINE))
}
FULL_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6}  # train.learning_rate of full fine-tuning: a tenth of an adapter's
LOSS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"simpo": {"beta": 2.0}}  # of [dpo], by loss_type


def sections_of(method: str | None) -> dict[str, type[Section]]:
    """The sections that a method reads: the shared ones and its own; None: all sections."""
    return {name: model for name, model in SECTIONS.items() if method in (None, name) or name not in METHODS}


def other_section(key: str, method: str) -> str:
    """For an error about a key that is not in the section of `method`: where it is; "" if no method has it."""
    owners = [other for other in METHODS if key in SECTIONS[other].model_fields]
    if method in owners:
        return f"did you mean {method}.{key}?"
    return f"{key} is a key of {', '.join(owners)}" if owners else ""
