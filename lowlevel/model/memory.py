"""Forecast of a step's GPU memory by component and phase, and the fastest plan that fits a budget.

The allocator's peak is the sum of the static part (weights, adapters, gradient) and the largest phase of the step.
Activations are counted in values per position and layer, as the compiled layers save them for the backward pass
(D: hidden size, F: MLP size, H: query width, K: key width):

    norms and residuals 4 D, q and output of attention 2 H, k and v 2 K, gate and up and their product 3 F,
    with dropout the dropped inputs of q, k, v, gate and up 5 D, of o H, of down F; without it D

A recomputed layer only saves its input (D). With train.offload_activations inputs are on the host and come back one
layer ahead, so two are on the device. The first layers are recomputed: the backward pass reaches them last, when the
activations of the others are freed. The constants were fitted to runs on an H100 (tests/training/test_memory.py).
Optimizer state is paged, outside the allocator, and listed separately.

In full fine-tuning each weight has an fp32 master and gradient. Products use a 16-bit copy of a weight, which layers
that are not recomputed keep until the backward pass. All optimizer state is used in each step, so a plan must have room
for it although it is paged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from lowlevel.config.schema import RunConfig
from lowlevel.determinism import FIXED, SMALL, workspace_bytes
from lowlevel.errors import ConfigError
from lowlevel.kernels import chunk_rows
from lowlevel.model.adapters import read_adapter_config
from lowlevel.model.base import empty_model
from lowlevel.model.moving_reference import Following, reads_reference
from lowlevel.model.placement import DTYPES, Placement
from lowlevel.model.quantisation import stored_quantisation
from lowlevel.model.targets import head_size, matched, size_of, unsupported

ABSMAX_BLOCK = 64  # weights that share a quantisation constant (bitsandbytes' default)
WORKSPACES = 4  # of cuBLAS: two streams (linear.py), each in the threads of the forward and of the backward pass
GATHERED = 3  # layers whose weights are whole at a time with FSDP2: this one, its collective's output, the next one's
DEQUANTISE_POSITIONS = 500  # on an H100, dequantising a layer takes as long as the products of this many positions


@dataclass(frozen=True)
class AdapterSize:
    """Rank and target modules of an adapter."""

    rank: int
    targets: tuple[str, ...]  # as `lowlevel.model.targets.matched` reads them
    dora: bool = False


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with its adapters, in values."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    vocabulary: int
    linear: int  # values in the layers' linear weights
    largest: int  # values of the largest of them
    other: int  # values in embeddings, LM head, norms, and experts that are not linear layers
    tied: bool  # the input embedding is the LM head
    adapted: int  # values in the linear weights of layers with an adapter, without `unquantised` ones
    trained: int  # values of the trained adapter; in full fine-tuning of everything
    frozen: int  # values of the frozen adapter under it
    unquantised: int = 0  # values in linear weights that a pre-quantised folder leaves in 16 bits
    scaled: int = 0  # outputs of a layer that DoRA scales
    shards: int = 1  # GPUs that share the weights of the layers (sharding.py)


@dataclass(frozen=True)
class Plan:
    """Settings that change speed and memory but not the result."""

    positions: int  # of a micro-batch
    recomputed: int  # layers
    dequantize_once: bool

    def settings(self) -> dict[str, Any]:
        """The plan as keys of [train]."""
        sizes = {"micro_batch_positions": self.positions, "recomputed_layers": self.recomputed}
        return {**sizes, "dequantize_once": self.dequantize_once}


@dataclass(frozen=True)
class Forecast:
    """Predicted memory of a run, in bytes."""

    static: dict[str, int]
    phases: dict[str, int]
    paged: int  # optimizer state, in managed memory
    host: int  # inputs of recomputed layers, in pinned host memory

    @property
    def peak(self) -> int:
        """torch.cuda.max_memory_allocated: the static part plus the largest phase."""
        return sum(self.static.values()) + max(self.phases.values())


def adapter_sizes(
    config: RunConfig, parent: Path | None, init_from: Path | None
) -> tuple[AdapterSize | None, AdapterSize | None]:
    """Sizes of the trained adapter (with `init_from`: that folder's) and of the frozen one under it, if stacked.

    None and None in full fine-tuning.
    """
    if config.full:
        return None, None

    def of(folder: Path) -> AdapterSize:
        found = read_adapter_config(folder)
        targets = found.target_modules or ()
        return AdapterSize(found.r, (targets,) if isinstance(targets, str) else tuple(targets), found.use_dora)

    lora = config.lora
    trained = of(init_from) if init_from else AdapterSize(lora.r, lora.target_modules, lora.use_dora)
    return trained, of(parent) if parent and config.model.adapter_mode == "stack" else None


def model_shape(base: PretrainedConfig, trained: AdapterSize | None, frozen: AdapterSize | None = None) -> ModelShape:
    """Sizes of a model, from its configuration only; `trained` None: all weights are trained.

    Raises ConfigError if it lacks a size or has no linear layers.
    """
    settings = base.to_dict()
    model: Any = empty_model(base)
    head, heads = head_size(base), size_of(base, "num_attention_heads")
    embeddings = {id(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in embeddings}

    def under(*adapters: AdapterSize | None) -> list[nn.Linear]:
        names = {name for adapter in adapters if adapter for name in matched(adapter.targets, linear)}
        return [linear[name] for name in names]

    def size(adapter: AdapterSize | None) -> int:
        if adapter is None:
            return 0
        rows = adapter.rank + adapter.dora
        return sum(adapter.rank * m.in_features + rows * m.out_features for m in under(adapter))

    if not linear:
        raise unsupported(base, "it has no linear layers")
    stored = stored_quantisation(base, base.name_or_path or "")
    plain = [linear[name] for name in stored.unquantised(model) if name in linear] if stored else []
    values, layers = sum(m.weight.numel() for m in linear.values()), size_of(base, "num_hidden_layers")
    parameters = {id(p): p.numel() for p in model.parameters()}
    tied = bool(settings.get("tie_word_embeddings"))
    if tied:  # the empty model still has separate tensors
        parameters.pop(id(model.get_output_embeddings().weight), None)
    return ModelShape(
        layers=layers,
        hidden=size_of(base, "hidden_size"),
        intermediate=size_of(base, "intermediate_size"),
        query=heads * head,
        key=(settings.get("num_key_value_heads") or heads) * head,
        vocabulary=size_of(base, "vocab_size"),
        linear=values,
        largest=max(m.weight.numel() for m in linear.values()),
        other=sum(parameters.values()) - values,
        tied=tied,
        adapted=sum(m.weight.numel() for m in under(trained, frozen) if m not in plain),
        trained=size(trained) if trained else sum(parameters.values()),
        frozen=size(frozen),
        unquantised=sum(m.weight.numel() for m in plain),
        scaled=sum(m.out_features for m in under(trained)) // layers if trained and trained.dora else 0,
    )


def forecast(shape: ModelShape, config: RunConfig, plan: Plan, placement: Placement) -> Forecast:
    """Predict a run's memory on a GPU."""
    size = DTYPES[placement.precision].itemsize
    quantised = _quantised(shape, config, plan)
    blocks = quantised // ABSMAX_BLOCK
    constants = blocks + blocks // 64 if config.model.bnb_4bit_use_double_quant else 4 * blocks
    dropped = config.active_dropout > 0
    kept = 4 * shape.hidden + 2 * shape.query + 2 * shape.key + 3 * shape.intermediate
    kept += 5 * shape.hidden + shape.query + shape.intermediate if dropped else shape.hidden
    kept += shape.scaled  # before they are scaled
    transient = 3 * shape.intermediate + 2 * shape.hidden  # gradients alive in a layer's backward pass
    weights = shape.largest * size if quantised else 0
    inputs = plan.recomputed * shape.hidden
    on_device = min(inputs, 2 * shape.hidden) if config.train.offload_activations else inputs
    stored = on_device + (shape.layers - plan.recomputed) * kept
    in_backward = on_device + max(shape.layers - plan.recomputed, 1) * kept  # at least one layer, recomputed or not
    on_host = config.model.embeddings_on_host and not shape.tied
    other = shape.other - (shape.vocabulary * shape.hidden if on_host else 0)
    head = shape.vocabulary * shape.hidden
    chunk = 0 if config.method == "reward" else chunk_rows(shape.vocabulary, size) * shape.vocabulary * size
    copies = of_head = 0
    layers = quantised // 2 + (shape.linear - quantised) * size
    static = {
        "base weights": layers // shape.shards,
        "quantisation constants": constants,
        "embeddings, LM head, norms": other * size,
        "adapters": (shape.trained * (1 + (Following.of(config) is not None)) + shape.frozen) * 4,
    }
    if config.full:  # 16-bit copies, and the gradient of one weight in 16 and 32 bits
        kept_copies = max(shape.layers - plan.recomputed, 1) * shape.linear // shape.layers * size
        copies = kept_copies + head * size + shape.largest * (size + 4)
        of_head = (shape.layers - plan.recomputed) * shape.linear // shape.layers * size + head * (2 * size + 8)
        reference = shape.trained * size if reads_reference(config) else 0
        static = {"master weights": shape.trained * 4, "reference weights": reference}
    return Forecast(
        static={
            **static,
            "gradient": shape.trained * 4,
            **({"gathered layers": GATHERED * layers // shape.layers} if shape.shards > 1 else {}),
            "cuBLAS workspaces": WORKSPACES * workspace_bytes(FIXED[0] if config.train.deterministic else SMALL),
        },
        phases={
            "layers": plan.positions * (in_backward + transient) * size + weights + copies,
            "LM head and loss": plan.positions * (stored + 4 * shape.hidden) * size + 2 * chunk + of_head,
        },
        paged=shape.trained * (8 if config.train.optim != "paged_adamw_8bit" else 2),
        host=plan.positions * inputs * size if config.train.offload_activations else 0,
    )


def _quantised(shape: ModelShape, config: RunConfig, plan: Plan) -> int:
    """Values in 4 bits; `dequantize_once` changes the adapted layers to 16 bits."""
    in_4_bits = shape.linear - shape.unquantised - shape.adapted * plan.dequantize_once
    return in_4_bits if config.model.load_in_4bit else 0


def default_plan(shape: ModelShape, config: RunConfig) -> Plan:
    """The plan of a configuration without a memory budget."""
    train = config.train
    recomputed = shape.layers if train.recomputed_layers is None else min(train.recomputed_layers, shape.layers)
    positions = train.micro_batch_positions or train.per_device_train_batch_size * config.row_positions
    return Plan(positions, recomputed if train.gradient_checkpointing else 0, bool(train.dequantize_once))


def cost(shape: ModelShape, config: RunConfig, plan: Plan) -> float:
    """Time of an optimizer step, in units of one position's products in one pass; for ranking plans."""
    step = step_positions(config)
    share = plan.recomputed / shape.layers
    others = {"dpo": 1, "kto": 3}.get(config.method, 0)  # passes of the reference, and of mismatched completions
    forward = others if reads_reference(config) else 0
    passes = 3 + share + forward
    repeated = DEQUANTISE_POSITIONS * _quantised(shape, config, plan) / shape.linear
    micro_batches = -(-step // plan.positions)
    return step * passes + micro_batches * (2 + share + forward) * (repeated + 60)


def step_positions(config: RunConfig) -> int:
    """Upper bound on the positions of an optimizer step."""
    return config.rows_per_step * config.row_positions


def plans(shape: ModelShape, config: RunConfig) -> list[Plan]:
    """Candidate plans: micro-batches from one sequence to a whole step, any number of recomputed layers."""
    step = step_positions(config)
    sizes = sorted({min(step, config.row_positions * 2**k) for k in range(step.bit_length())})
    once = (False, True) if config.model.load_in_4bit and shape.shards == 1 else (False,)
    return [Plan(n, r, d) for n in sizes for r in range(shape.layers + 1) for d in once]


def best_plan(shape: ModelShape, config: RunConfig, placement: Placement, budget: int) -> Plan:
    """The fastest plan whose forecast fits `budget` bytes. Raises ConfigError if even the smallest does not."""
    found = {p: forecast(shape, config, p, placement) for p in plans(shape, config)}
    needed = {p: one.peak + one.paged * config.full for p, one in found.items()}
    fitting = [p for p in needed if needed[p] <= budget]
    if not fitting:
        hint = "lower data.max_length or lora.r"
        hint += "" if shape.shards > 1 or config.sampled else ", or share the base among GPUs (--gpus 2)"
        if config.full:
            state = next(iter(found.values())).paged + 8 * shape.trained
            hint = (
                f"{state / 2**30:.2f} GiB of it are fp32 weights, gradient and optimizer state of {shape.trained:,} "
                'trained weights; set train.finetuning_type = "lora"'
            )
            hint += ' or train.optim = "paged_adamw_8bit"' * (config.train.optim != "paged_adamw_8bit")
        raise ConfigError(
            f"train.memory_budget: {budget / 2**30:.2f} GiB is too little: the smallest plan needs "
            f"{min(needed.values()) / 2**30:.2f} GiB; {hint}"
        )
    return min(fitting, key=lambda p: (cost(shape, config, p), found[p].peak))


def planned(config: RunConfig, plan: Plan) -> RunConfig:
    """The configuration with the plan's settings."""
    recomputes = plan.recomputed > 0
    offload = config.train.offload_activations and recomputes
    settings = {"gradient_checkpointing": recomputes, "offload_activations": offload, "memory_budget": None}
    return config.changed(train={**plan.settings(), **settings})
