"""`lowlevel plan`: what a run will need of a GPU's memory, and the fastest way to fit a budget. No GPU, no weights.
`lowlevel memory`: what it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 2**20


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
    asked = default_plan(shape, config)
    plans = {"as configured": asked}
    if config.data.packing:
        plans[f"fastest in {text}"] = best_plan(shape, config, placement, size)
    forecasts = {name: forecast(shape, config, plan, placement) for name, plan in plans.items()}
    console.print(_plan_table(shape, config, plans, forecasts))
    paged = forecasts["as configured"].paged
    console.print(f"optimizer state: {paged / MIB:,.0f} MiB more, paged (outside the allocator's peak)")
    if not config.data.packing:
        console.print("data.packing = false: rows of one example each; a plan for a budget needs data.packing = true")
        return
    console.print(f"to use it: --train.memory_budget {text}, or in \\[train]:")
    for line in _settings(config, plans[f"fastest in {text}"]):
        console.print(f"  {line}", markup=False, highlight=False)


def _settings(config: RunConfig, plan: Plan) -> list[str]:
    keys = ["gradient_checkpointing", *plan.settings(), *["offload_activations"] * config.train.offload_activations]
    train = planned(config, plan).train
    return [f"{key} = {json.dumps(getattr(train, key))}" for key in keys]


def _plan_table(
    shape: ModelShape, config: RunConfig, plans: Mapping[str, Plan], forecasts: Mapping[str, Forecast]
) -> Table:
    table = Table(title="forecast of a GPU's memory, MiB", title_justify="left")
    table.add_column("")
    for name in plans:
        table.add_column(name, justify="right")
    first = next(iter(forecasts.values()))
    for part in first.static:
        table.add_row(part, *(f"{f.static[part] / MIB:,.0f}" for f in forecasts.values()))
    for phase in first.phases:
        table.add_row(f"activations: {phase}", *(f"{f.phases[phase] / MIB:,.0f}" for f in forecasts.values()))
    table.add_section()
    table.add_row("peak allocated", *(f"{f.peak / MIB:,.0f}" for f in forecasts.values()))
    if config.train.offload_activations:
        table.add_row("inputs of recomputed layers, on the host", *(f"{f.host / MIB:,.0f}" for f in forecasts.values()))
    table.add_section()
    table.add_row("positions a micro-batch", *(f"{plan.positions:,}" for plan in plans.values()))
    table.add_row("layers recomputed", *(f"{plan.recomputed} of {shape.layers}" for plan in plans.values()))
    table.add_row("4-bit weights dequantised", *("once" if p.dequantize_once else "each pass" for p in plans.values()))
    slowest = max(cost(shape, config, plan) for plan in plans.values())
    table.add_row("speed, relative", *(f"{slowest / cost(shape, config, plan):.2f}" for plan in plans.values()))
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
