"""Pictures and the README's table from the CSVs of step.py and scaling.py.

    python -m benchmarks.plots --table out/step/step.csv [--scaling out/scaling/scaling.csv] --out out/plots

Writes step.png (tokens/s of every case, with its ratio to TRL at the recipe's setting), losses.png (the same 20 steps
in eager and in captured execution) and scaling.png; prints the table as Markdown. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; tools also differ in hatching, curves in dashes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.runner import read_table, read_tables

Row = dict[str, str]
COLOURS = {"lowlevel": "#0072B2", "trl": "#E69F00", "unsloth": "#009E73", "liger": "#CC79A7", "plain": "#999999"}
HATCHES = {"lowlevel": "", "trl": "//", "unsloth": "..", "liger": "xx", "plain": "--"}
NAMES = {"lowlevel": "lowlevel", "trl": "TRL", "unsloth": "Unsloth", "liger": "PEFT + Liger", "plain": "PEFT by hand"}
BASELINE = "trl_{}_2x4"
LOSSES = ("eager", "compiled", "graphed")
AXES = {"length": "tokens of the one row", "batch": "rows of 512, nothing recomputed", "rank": "rank, 2 rows of 512",
        "model": "model, 2 rows of 512"}  # fmt: skip


def label(row: Row) -> str:
    """A row's tool and setting; TRL's precision, where a case leaves it open, is bf16 (peers/trl_peer.py)."""
    bf16 = row["tool"] == "trl" and "fp16" not in row["setting"] and row["gpu"].startswith("NVIDIA")
    return f"{NAMES[row['tool']]} {row['setting']}{', bf16' if bf16 else ''}"


def ok(rows: Sequence[Row], method: str) -> list[Row]:
    """Rows of a method that have numbers."""
    return [row for row in rows if row["method"] == method and row["status"] == "ok"]


def ratio(row: Row, rows: Sequence[Row]) -> str:
    """Speed beside TRL at the recipe's setting, or nothing where that was not measured."""
    base = [r for r in rows if r["case"] == BASELINE.format(row["method"]) and r["status"] == "ok"]
    return f"{float(row['tokens_per_second']) / float(base[0]['tokens_per_second']):.1f}x" if base else ""


def plot_steps(rows: Sequence[Row], path: Path) -> None:
    """Bars of tokens/s, a panel a method."""
    methods = [method for method in ("sft", "dpo") if ok(rows, method)]
    if not methods:
        return
    heights = [len(ok(rows, method)) for method in methods]
    figure = Figure(figsize=(9, 1.2 + 0.36 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(methods), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, method in zip(panels, methods, strict=True):
        chosen = ok(rows, method)
        speeds = [float(row["tokens_per_second"]) for row in chosen]
        tools = [row["tool"] for row in chosen]
        bars = axis.barh([label(row) for row in chosen], speeds, color=[COLOURS[tool] for tool in tools])
        for bar, tool in zip(bars, tools, strict=True):
            bar.set(hatch=HATCHES[tool], edgecolor="white")
        texts = [f" {speed:,.0f}  {ratio(row, rows)}" for speed, row in zip(speeds, chosen, strict=True)]
        axis.bar_label(bars, texts, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_title(method.upper(), loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("real tokens/s (x: times TRL at 2x4)")
    shape = f"{rows[0]['shape']} shape with random weights, r = 64"
    figure.suptitle(f"{rows[0]['gpu']}: {shape}, allocator capped at {rows[0]['cap_gib']} GiB", fontsize=11)
    figure.savefig(path, dpi=130)


def loss_pairs(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By method, rows of lowlevel at the recipe's setting that differ in execution alone."""
    names = [f"lowlevel_{{}}_2x4_{execution}" for execution in LOSSES]
    found = {m: [r for n in names for r in ok(rows, m) if r["case"] == n.format(m)] for m in ("sft", "dpo")}
    return {method: chosen for method, chosen in found.items() if len(chosen) > 1}


def plot_losses(rows: Sequence[Row], path: Path) -> None:
    """Loss over steps by execution, with the largest difference from eager."""
    pairs = loss_pairs(rows)
    if not pairs:
        return
    styles = {"eager": ("-", "#000000"), "compiled": (":", "#D55E00"), "graphed": ("--", "#0072B2")}
    figure = Figure(figsize=(5 * len(pairs), 3.4), layout="constrained")
    for axis, (method, chosen) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True):
        curves = {row["execution"]: [float(x) for x in row["losses"].split(";")] for row in chosen}
        for execution, losses in curves.items():
            style, colour = styles[execution]
            axis.plot(range(1, len(losses) + 1), losses, style, color=colour, label=execution)
        first, *others = curves.values()
        apart = max(abs(a - b) for other in others for a, b in zip(first, other, strict=False))
        axis.set(title=f"{method.upper()}: at most {apart:.2g} apart", xlabel="optimizer step", ylabel="loss (nats)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def plot_scaling(rows: Sequence[Row], path: Path) -> None:
    """Tokens/s and peak memory, a panel an axis."""
    good = [row for row in rows if row["status"] == "ok"]
    axes = list(dict.fromkeys(row["axis"] for row in good))
    if not axes:
        return
    figure = Figure(figsize=(3.6 * len(axes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, name in zip(panels, axes, strict=True):
        chosen = [row for row in good if row["axis"] == name]
        values = [row["value"] for row in chosen]
        speed = panel.plot(values, [float(r["tokens_per_second"]) for r in chosen], "o-", color="#0072B2")[0]
        memory = panel.twinx()
        used = memory.plot(values, [float(r["device_used_gib"]) for r in chosen], "s--", color="#D55E00")[0]
        panel.set(xlabel=AXES.get(name, name), ylim=(0, 1.08 * panel.get_ylim()[1]))
        panel.yaxis.set_major_formatter("{x:,.0f}")
        memory.set(ylim=(0, 1.08 * memory.get_ylim()[1]))
        panel.tick_params(axis="x", labelrotation=30 if name == "model" else 0)
        if panel is panels[0]:
            keys = ["tokens/s (left)", "GiB of the device in use (right)"]
            figure.legend([speed, used], keys, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{good[0]['gpu']}: one SFT micro-batch per step, {good[0]['execution']}")
    figure.savefig(path, dpi=130)


def markdown(rows: Sequence[Row]) -> str:
    """The table for the README; a case that failed says why."""
    lines = ["| | tokens/s | s a step (p10, p90) | peak GiB | device GiB | beside TRL 2x4 |", "|---" * 6 + "|"]
    for row in rows:
        name = f"{row['method'].upper()}, {label(row)}"
        if row["status"] != "ok":
            lines.append(f"| {name} | {row['status'].removeprefix('failed: ')} | | | | |")
            continue
        median, low, high = (float(row[f"seconds_{name}"]) for name in ("per_step", "p10", "p90"))
        spread = f"{median:.3f} ({low:.3f}, {high:.3f})"
        memory = f"{float(row['peak_allocated_gib']):.2f} | {float(row['device_used_gib']):.2f}"
        lines.append(f"| {name} | {int(row['tokens_per_second']):,} | {spread} | {memory} | {ratio(row, rows)} |")
    return "\n".join(lines)


def main() -> None:
    """Draw what there is, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, nargs="+", default=[], help="CSVs of step.py")
    parser.add_argument("--scaling", type=Path, help="CSV of scaling.py")
    parser.add_argument("--out", type=Path, default=Path("out/plots"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.table:
        rows = read_tables(options.table)
        plot_steps(rows, options.out / "step.png")
        plot_losses(rows, options.out / "losses.png")
        print(markdown(rows))
    if options.scaling:
        plot_scaling(read_table(options.scaling), options.out / "scaling.png")


if __name__ == "__main__":
    main()
