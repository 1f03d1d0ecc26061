"""`lowlevel plan`: forecast of a run's GPU memory, and the fastest plan within a budget; needs no GPU and no weights.
`lowlevel memory`: the memory that a run measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lowlevel.config.contradictions import parse_size
from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError
from lowlevel.methods.choice import mixed_by_a_budget, run_loss
from lowlevel.model.base import describe_base, load_model_config
from lowlevel.model.memory import (
    AdapterSize,
    Forecast,
    ModelShape,
    Plan,
    adapter_sizes,
    best_plan,
    cost,
    default_plan,
    forecast,
    model_shape,
    planned,
)
from lowlevel.model.placement import Placement
from lowlevel.running.adapter_sources import find_adapter
from lowlevel.running.assembly import with_stored
from lowlevel.running.gpu_memory import with_shards
from lowlevel.table import table_of

MIB = 2**20
ON_HOST = ("model.embeddings_on_host", "train.offload_activations")  # may be kept on the host, at the cost of copies


def show_plan(config: RunConfig, console: Console, budget: str | None, gpus: int = 1) -> None:
    """Forecast the configuration as it stands and the fastest plan within the budget, side by side; both for one GPU,
    and what `gpus` of them change.

    Raises ConfigError for a malformed budget, or one that no plan fits; CheckpointError if an adapter is not LoRA.
    """
    text = budget or config.train.memory_budget or "15GiB"
    size = parse_size(text)
    if not size:
        raise ConfigError(f'--budget: expected a size like "15GiB" or "800MiB", got {text!r}')
    config = with_stored(config)
    shape, placement = _target(config)
    shape = with_shards(shape, config, placement, gpus, size)
    columns = [_as_configured(config, shape, placement)]
    fixed = _why_fixed(config)
    if not fixed:
        columns.append(Column(f"fastest in {text}", config, best_plan(shape, config, placement, size)))
        columns += _with_host(columns[-1], shape, placement, size)
    forecasts = [forecast(shape, column.config, column.plan, placement) for column in columns]
    console.print(_plan_table(shape, columns, forecasts))
    console.print(f"optimizer state: {forecasts[0].paged / MIB:,.0f} MiB more, paged (outside the allocator's peak)")
    console.print(OUTSIDE)
    if gpus > 1:
        line = _on_several(config, gpus, shape, forecasts[0])
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    base = f"{config.model.name}, {describe_base(config.model)}"
    console.print(f"{config.method}: {base}", markup=False, highlight=False, soft_wrap=True)
    if fixed:
        console.print(fixed)
    if config.sampled:
        console.print("sampling: up to a quarter of the free memory more for its cache, and as much for copied weights")
    for column in columns[1:]:
        asked = "".join(f" --{key} true" for key in column.on_host)
        budget = "" if config.sampled else f" --train.memory_budget {text}{asked}; or, as it then says:"
        console.print(f"{column.name}:{budget}")
        for line in _settings(column):
            console.print(f"  {line}", markup=False, highlight=False)


# benchmarks/results/step_h100.csv and peers_h100.csv: device_used_gib less peak_allocated_gib.
OUTSIDE = "driver, captured graphs and gaps of the allocator: 0.9 to 1.9 GiB more (measured on an H100)"


PCIE = 6e9  # bytes a second between two T4s that reach each other through the host; assumed, not measured


def _on_several(config: RunConfig, gpus: int, shape: ModelShape, expected: Forecast) -> str:
    """What several GPUs change."""
    gradient = shape.trained * 4
    batches = config.train.gradient_accumulation_steps
    share = 1 / gpus if config.data.packing else -(-batches // gpus) / batches
    seconds = 2 * (gpus - 1) / gpus * gradient / PCIE
    more = ""
    if not config.data.packing and gpus > batches:
        more = f"; only {batches} of them work: raise gradient_accumulation_steps"
    if shape.shards > 1:
        others = (gpus - 1) * expected.static["base weights"] / 1e9
        more += f"; each holds 1/{gpus} of every layer, and gets {others:,.1f} GB more in each pass; no CUDA graphs"
    return (
        f"{gpus} GPUs: each needs the memory above; a step takes about {share:.0%} of the time, and "
        f"{seconds * 1e3:,.0f} ms to sum {gradient / 1e6:,.0f} MB of gradient at {PCIE / 1e9:g} GB/s{more}"
    )


@dataclass(frozen=True)
class Column:
    """A plan in the table, with its configuration."""

    name: str
    config: RunConfig
    plan: Plan
    on_host: tuple[str, ...] = ()  # keys that this plan switches on


def _target(config: RunConfig) -> tuple[ModelShape, Placement]:
    """The model with its adapters, and where it runs; an adapter that is not trained yet has the sizes of [lora]."""
    own = AdapterSize(config.lora.r, config.lora.target_modules)
    init_from = find_adapter(config.lora.init_from, "lora.init_from")
    try:
        sizes = adapter_sizes(config, find_adapter(config.model.adapter, "model.adapter"), init_from)
    except ConfigError:
        sizes = adapter_sizes(config, None, init_from)[0], own if config.model.adapter_mode == "stack" else None
    precision = "fp16" if config.train.precision == "auto" else config.train.precision
    return model_shape(load_model_config(config.model), *sizes), Placement(torch.device("cuda"), precision)


def _as_configured(config: RunConfig, shape: ModelShape, placement: Placement) -> Column:
    """The configuration with its default plan, or with the plan for the run file's memory budget."""
    budget = parse_size(config.train.memory_budget or "")
    if budget and not _why_fixed(config):
        plan = best_plan(shape, config, placement, budget)
        return Column(f"as configured ({config.train.memory_budget})", config, plan)
    return Column("as configured", config, default_plan(shape, config))


def _why_fixed(config: RunConfig) -> str:
    """Why a budget cannot choose the micro-batches of this run; empty if it can."""
    if not config.data.packing:
        return "data.packing = false: rows of one example each; a plan for a budget needs data.packing = true"
    if run_loss(config).mixes_pairs:
        return mixed_by_a_budget(config)
    return ""


def _with_host(fastest: Column, shape: ModelShape, placement: Placement, size: int) -> list[Column]:
    """The fastest plan with everything possible on the host, if it is faster: micro-batches can be larger."""
    config, tied = fastest.config, shape.tied
    on_host = {} if tied else {"embeddings_on_host": True}
    moved = config.changed(model=on_host, train={"offload_activations": True})
    plan = best_plan(shape, moved, placement, size)
    if cost(shape, moved, plan) >= cost(shape, config, fastest.plan):
        return []
    return [Column("with more on the host", moved, plan, ON_HOST[tied:])]


def _settings(column: Column) -> list[str]:
    offload, embeddings = column.config.train.offload_activations, column.config.model.embeddings_on_host
    keys = ["gradient_checkpointing", *column.plan.settings(), *["offload_activations"] * offload]
    train = planned(column.config, column.plan).train
    lines = [f"train.{key} = {json.dumps(getattr(train, key))}" for key in keys]
    return lines + ["model.embeddings_on_host = true"] * embeddings


def _plan_table(shape: ModelShape, columns: Sequence[Column], forecasts: Sequence[Forecast]) -> Table:
    def line(name: str, sizes: Iterable[int]) -> list[str]:
        return [name, *(f"{size / MIB:,.0f}" for size in sizes)]

    plans = [column.plan for column in columns]
    costs = [cost(shape, column.config, column.plan) for column in columns]
    static, phases = forecasts[0].static, forecasts[0].phases
    rows: list[list[str] | None] = [line(part, [f.static[part] for f in forecasts]) for part in static]
    rows += [line(f"activations: {phase}", [f.phases[phase] for f in forecasts]) for phase in phases]
    rows += [None, line("peak allocated", [f.peak for f in forecasts])]
    if any(column.config.train.offload_activations for column in columns):
        rows.append(line("inputs of recomputed layers, on the host", [f.host for f in forecasts]))
    rows += [None, ["positions a micro-batch", *(f"{plan.positions:,}" for plan in plans)]]
    rows.append(["layers recomputed", *(f"{plan.recomputed} of {shape.layers}" for plan in plans)])
    if columns[0].config.model.load_in_4bit:
        rows.append(["4-bit weights dequantised", *("once" if p.dequantize_once else "each pass" for p in plans)])
    rows.append(["speed, relative", *(f"{max(costs) / one:.2f}" for one in costs)])
    title = "forecast of a GPU's memory, MiB"
    return table_of(("<", *(column.name for column in columns)), rows, title=title, title_justify="left")


def show_memory(run_dir: Path, console: Console) -> None:
    """Print the memory of a run's largest micro-batch, measured before its first step. Raises ConfigError if it was
    not measured.
    """
    try:
        report: dict[str, Any] = json.loads((run_dir / "memory.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{run_dir} holds no memory.json: memory is measured in runs on a GPU") from None
    kept = {**report["components"], "activations kept for the backward pass": report["kept_for_backward"]}
    whole = {f"peak allocated: {phase}": peak for phase, peak in report["phases"].items()}
    whole |= {"reserved by the allocator": report["reserved"], "in use on the device": report["device_used"]}
    parts, wholes = ([(name, f"{size / MIB:,.1f}") for name, size in sizes.items()] for sizes in (kept, whole))
    title = f"memory of {run_dir.name}, MiB ({report['positions']:,} positions)"
    console.print(table_of(("<", "MiB"), [*parts, None, *wholes], title=title, title_justify="left"))
