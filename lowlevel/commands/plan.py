"""`lowlevel plan`: what a run will need of a GPU's memory, and the fastest way to fit a budget. No GPU, no weights.
`lowlevel memory`: what it took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lowlevel.config import RunConfig
from lowlevel.contradictions import parse_size
from lowlevel.errors import ConfigError
from lowlevel.model.base import load_model_config
from lowlevel.model.memory import (
    Forecast,
    ModelShape,
    Plan,
    best_plan,
    cost,
    default_plan,
    forecast,
    model_shape,
    planned,
)
from lowlevel.model.placement import Placement
from lowlevel.plots import plot_memory

MIB = 2**20
ON_HOST = ("model.embeddings_on_host", "train.offload_activations")  # what may lie there, for a longer way to the GPU


def show_plan(config: RunConfig, console: Console, budget: str | None) -> None:
    """Forecast the configuration as it stands and the fastest plan within the budget, side by side.

    Raises:
        ConfigError: a malformed budget, or one that nothing fits.
    """
    text = budget or config.train.memory_budget or "15GiB"
    size = parse_size(text)
    if not size:
        raise ConfigError(f'--budget: expected a size like "15GiB" or "800MiB", got {text!r}')
    precision = "fp16" if config.train.precision == "auto" else config.train.precision
    placement = Placement(torch.device("cuda"), precision)
    shape = model_shape(load_model_config(config.model), config.lora.target_modules)
    columns = [Column("as configured", config, default_plan(shape, config))]
    if config.data.packing:
        columns.append(Column(f"fastest in {text}", config, best_plan(shape, config, placement, size)))
        columns += _with_host(columns[-1], shape, placement, size)
    forecasts = [forecast(shape, column.config, column.plan, placement) for column in columns]
    console.print(_plan_table(shape, columns, forecasts))
    console.print(f"optimizer state: {forecasts[0].paged / MIB:,.0f} MiB more, paged (outside the allocator's peak)")
    if not config.data.packing:
        console.print("data.packing = false: rows of one example each; a plan for a budget needs data.packing = true")
    for column in columns[1:]:
        asked = "".join(f" --{key} true" for key in ON_HOST if column.config is not config)
        console.print(f"{column.name}: --train.memory_budget {text}{asked}; or, as it then says:")
        for line in _settings(column):
            console.print(f"  {line}", markup=False, highlight=False)


@dataclass(frozen=True)
class Column:
    """A plan of the table, and the configuration that it is a plan for."""

    name: str
    config: RunConfig
    plan: Plan


def _with_host(fastest: Column, shape: ModelShape, placement: Placement, size: int) -> list[Column]:
    """The fastest plan with all on the host that may lie there, if that is faster: room for larger micro-batches."""
    model = fastest.config.model.model_copy(update={"embeddings_on_host": True})
    train = fastest.config.train.model_copy(update={"offload_activations": True})
    config = fastest.config.model_copy(update={"model": model, "train": train})
    plan = best_plan(shape, config, placement, size)
    faster = cost(shape, config, plan) < cost(shape, fastest.config, fastest.plan)
    return [Column("with more on the host", config, plan)] if faster else []


def _settings(column: Column) -> list[str]:
    offload, embeddings = column.config.train.offload_activations, column.config.model.embeddings_on_host
    keys = ["gradient_checkpointing", *column.plan.settings(), *["offload_activations"] * offload]
    train = planned(column.config, column.plan).train
    lines = [f"train.{key} = {json.dumps(getattr(train, key))}" for key in keys]
    return lines + ["model.embeddings_on_host = true"] * embeddings


def _plan_table(shape: ModelShape, columns: Sequence[Column], forecasts: Sequence[Forecast]) -> Table:
    table = Table(title="forecast of a GPU's memory, MiB", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")
    for part in forecasts[0].static:
        table.add_row(part, *(f"{f.static[part] / MIB:,.0f}" for f in forecasts))
    for phase in forecasts[0].phases:
        table.add_row(f"activations: {phase}", *(f"{f.phases[phase] / MIB:,.0f}" for f in forecasts))
    table.add_section()
    table.add_row("peak allocated", *(f"{f.peak / MIB:,.0f}" for f in forecasts))
    if any(column.config.train.offload_activations for column in columns):
        table.add_row("inputs of recomputed layers, on the host", *(f"{f.host / MIB:,.0f}" for f in forecasts))
    table.add_section()
    plans = [column.plan for column in columns]
    table.add_row("positions a micro-batch", *(f"{plan.positions:,}" for plan in plans))
    table.add_row("layers recomputed", *(f"{plan.recomputed} of {shape.layers}" for plan in plans))
    table.add_row("4-bit weights dequantised", *("once" if p.dequantize_once else "each pass" for p in plans))
    costs = [cost(shape, column.config, column.plan) for column in columns]
    table.add_row("speed, relative", *(f"{max(costs) / one:.2f}" for one in costs))
    return table


def show_memory(run_dir: Path, console: Console, plot: Path | None) -> None:
    """Print what the largest micro-batch of a run took, as measured before its first step.

    Raises:
        ConfigError: the run measured nothing.
    """
    try:
        report: dict[str, Any] = json.loads((run_dir / "memory.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{run_dir} holds no memory.json: memory is measured in runs on a GPU") from None
    table = Table(title=f"memory of {run_dir.name}, MiB ({report['positions']:,} positions)", title_justify="left")
    table.add_column("")
    table.add_column("MiB", justify="right")
    for name, size in report["components"].items():
        table.add_row(name, f"{size / MIB:,.1f}")
    table.add_row("activations kept for the backward pass", f"{report['kept_for_backward'] / MIB:,.1f}")
    table.add_section()
    for phase, peak in report["phases"].items():
        table.add_row(f"peak allocated: {phase}", f"{peak / MIB:,.1f}")
    table.add_row("reserved by the allocator", f"{report['reserved'] / MIB:,.1f}")
    table.add_row("in use on the device", f"{report['device_used'] / MIB:,.1f}")
    console.print(table)
    if plot:
        plot_memory(report, plot, title=run_dir.name)
        console.print(f"plot saved to {plot}")
