"""How much GPU memory a step takes, by component and phase, and the fastest plan that fits a budget.

What the allocator holds at its peak is the sum of what is always there (weights, adapters, gradient) and the largest
of the step's phases. Activations are counted in values a position and layer, as the compiled layers keep them for the
backward pass (D: hidden size, F: MLP size, H: query width, K: key width, dropout p > 0 keeps the dropped inputs too):

    norms and residuals 4 D, q and output of attention 2 H, k and v 2 K, gate and up and their product 3 F,
    dropped inputs of q, k, v, gate and up 5 D, of o H, of down F

A recomputed layer keeps its input alone (D), with train.offload_activations on the host, from where it comes back one
layer ahead: two lie on the device. Recomputed are the first layers: when they are, those of the others are gone. The
constants were fitted to runs on an H100, twelve of which tests/training/test_memory.py holds the forecast to. Optimizer
state is paged and outside the allocator: it is listed apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lowlevel.config import RunConfig
from lowlevel.errors import ConfigError
from lowlevel.kernels import chunk_rows
from lowlevel.model.base import empty_model
from lowlevel.model.placement import DTYPES, Placement

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ABSMAX_BLOCK = 64  # weights that share a quantisation constant (bitsandbytes' default)
WORKSPACE = 33_554_432  # what cuBLAS keeps on Hopper for the stream that multiplies
LOWER_WORKSPACE = 8_519_680  # below compute capability 9.0, unless determinism.py asks for a fixed one
BACKWARD_VALUES = 1.6  # gradients alive in a layer's backward pass, as a multiple of its widest activation (3 F)
DEQUANTISE_POSITIONS = 500  # on an H100 dequantising a layer takes as long as this many positions' products


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, in values and bytes."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    vocabulary: int
    linear: int  # values in the layers' linear weights
    largest: int  # values of the largest of them
    other: int  # values in embeddings, LM head and norms
    adapter: int  # trainable values at rank 1


@dataclass(frozen=True)
class Plan:
    """What may change without changing what is learned."""

    positions: int  # computed at once
    recomputed: int  # layers
    dequantize_once: bool

    def settings(self) -> dict[str, Any]:
        """As keys of [train]."""
        return {
            "micro_batch_positions": self.positions,
            "recomputed_layers": self.recomputed,
            "dequantize_once": self.dequantize_once,
        }


@dataclass(frozen=True)
class Forecast:
    """Bytes. `static` is always there; of `phases` the largest counts."""

    static: dict[str, int]
    phases: dict[str, int]
    paged: int  # optimizer state, in managed memory
    host: int  # inputs of recomputed layers, in pinned host memory

    @property
    def peak(self) -> int:
        """What torch.cuda.max_memory_allocated will say."""
        return sum(self.static.values()) + max(self.phases.values())


def model_shape(base: PretrainedConfig, targets: tuple[str, ...]) -> ModelShape:
    """Sizes of a model from its configuration, without its weights."""
    settings = base.to_dict()
    model: Any = empty_model(base)
    head = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    embeddings = {id(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in embeddings}
    adapted = [m for n, m in linear.items() if n.rsplit(".", 1)[-1] in targets]
    values = sum(m.weight.numel() for m in linear.values())
    parameters = {id(p): p.numel() for p in model.parameters()}
    if settings.get("tie_word_embeddings"):  # without weights nothing is tied
        parameters.pop(id(model.get_output_embeddings().weight), None)
    return ModelShape(
        layers=settings["num_hidden_layers"],
        hidden=settings["hidden_size"],
        intermediate=settings["intermediate_size"],
        query=settings["num_attention_heads"] * head,
        key=settings.get("num_key_value_heads", settings["num_attention_heads"]) * head,
        vocabulary=settings["vocab_size"],
        linear=values,
        largest=max(m.weight.numel() for m in linear.values()),
        other=sum(parameters.values()) - values,
        adapter=sum(m.in_features + m.out_features for m in adapted),
    )


def forecast(
    shape: ModelShape, config: RunConfig, plan: Plan, placement: Placement, *, hopper: bool = True
) -> Forecast:
    """Predict a run's memory on a GPU, in bytes."""
    size = DTYPES[placement.precision].itemsize
    parents = 1 if config.model.adapter and config.model.adapter_mode == "stack" else 0
    adapter = shape.adapter * config.lora.r
    quantised = config.model.load_in_4bit
    constants = 0
    if not quantised or plan.dequantize_once:
        base = shape.linear * size
    else:
        base = shape.linear // 2
        blocks = shape.linear // ABSMAX_BLOCK
        constants = blocks + blocks // 64 if config.model.bnb_4bit_use_double_quant else 4 * blocks
    dropped = config.lora.lora_dropout > 0 and not (config.method == "dpo" and config.dpo.disable_dropout)
    kept = 4 * shape.hidden + 2 * shape.query + 2 * shape.key + 3 * shape.intermediate
    if dropped:
        kept += 5 * shape.hidden + shape.query + shape.intermediate
    transient = int(BACKWARD_VALUES * 3 * shape.intermediate) + 2 * shape.hidden
    weights = 0 if plan.dequantize_once or not quantised else 2 * shape.largest * size
    inputs = plan.recomputed * shape.hidden
    on_device = min(inputs, 2 * shape.hidden) if config.train.offload_activations else inputs
    stored = on_device + (shape.layers - plan.recomputed) * kept
    in_backward = on_device + max(shape.layers - plan.recomputed, 1) * kept  # of the last layers, or of one made anew
    other = shape.other - (shape.vocabulary * shape.hidden if config.model.embeddings_on_host else 0)
    chunk = chunk_rows(shape.vocabulary, size) * shape.vocabulary * size
    return Forecast(
        static={
            "base weights": base,
            "quantisation constants": constants,
            "embeddings, LM head, norms": other * size,
            "adapters": adapter * 4 * (1 + parents),
            "gradient": adapter * 4,
            "cuBLAS workspaces": WORKSPACE if hopper or config.train.deterministic else LOWER_WORKSPACE,
        },
        phases={
            "layers": plan.positions * (in_backward + transient) * size + weights,
            "LM head and loss": plan.positions * (stored + 4 * shape.hidden) * size + 2 * chunk,
        },
        paged=adapter * (8 if config.train.optim != "paged_adamw_8bit" else 2),
        host=plan.positions * inputs * size if config.train.offload_activations else 0,
    )


def default_plan(shape: ModelShape, config: RunConfig) -> Plan:
    """What the configuration asks for without a budget."""
    train = config.train
    length = config.data.max_length * (1 if config.method == "sft" else 2)
    recomputed = shape.layers if train.recomputed_layers is None else min(train.recomputed_layers, shape.layers)
    return Plan(
        positions=train.micro_batch_positions or train.per_device_train_batch_size * length,
        recomputed=recomputed if train.gradient_checkpointing else 0,
        dequantize_once=train.dequantize_once,
    )


def cost(shape: ModelShape, config: RunConfig, plan: Plan) -> float:
    """Time of an optimizer step, in positions' products of one pass: what plans are ranked by."""
    step = step_positions(config)
    share = plan.recomputed / shape.layers
    passes = 3 + share + (config.method == "dpo")
    repeated = 0 if plan.dequantize_once or not config.model.load_in_4bit else DEQUANTISE_POSITIONS
    micro_batches = -(-step // plan.positions)
    return step * passes + micro_batches * (2 + share + (config.method == "dpo")) * (repeated + 60)


def step_positions(config: RunConfig) -> int:
    """Most positions of an optimizer step."""
    length = config.data.max_length * (1 if config.method == "sft" else 2)
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * length


def plans(shape: ModelShape, config: RunConfig) -> list[Plan]:
    """Every plan worth a look: micro-batches from one sequence to a whole step, any number of recomputed layers."""
    length = config.data.max_length * (1 if config.method == "sft" else 2)
    step = step_positions(config)
    sizes = sorted({min(step, length * 2**k) for k in range(step.bit_length())})
    once = (False, True) if config.model.load_in_4bit else (False,)
    return [Plan(n, r, d) for n in sizes for r in range(shape.layers + 1) for d in once]


def best_plan(shape: ModelShape, config: RunConfig, placement: Placement, budget: int, *, hopper: bool = True) -> Plan:
    """The fastest plan whose forecast fits `budget` bytes.

    Raises:
        ConfigError: not even the smallest plan fits.
    """
    fitting = [p for p in plans(shape, config) if forecast(shape, config, p, placement, hopper=hopper).peak <= budget]
    if not fitting:
        least = min(forecast(shape, config, p, placement, hopper=hopper).peak for p in plans(shape, config))
        raise ConfigError(
            f"train.memory_budget: {budget / 2**30:.2f} GiB is too little: the smallest plan needs "
            f"{least / 2**30:.2f} GiB; lower data.max_length or lora.r"
        )
    return min(fitting, key=lambda p: (cost(shape, config, p), forecast(shape, config, p, placement).peak))


def planned(config: RunConfig, plan: Plan) -> RunConfig:
    """The configuration with a plan's settings in it."""
    recomputes = plan.recomputed > 0
    settings = {
        **plan.settings(),
        "gradient_checkpointing": recomputes,
        "offload_activations": config.train.offload_activations and recomputes,
        "memory_budget": None,
    }
    train = config.train.model_copy(update=settings)
    return config.model_copy(update={"train": train})
