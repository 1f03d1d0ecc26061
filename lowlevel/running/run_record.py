"""Files and printed lines of a run before its first step and after its last."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lowlevel.batch.order import DataOrder
from lowlevel.checkpoints.row_digests import write_row_digests
from lowlevel.config.schema import RunConfig
from lowlevel.data.formats import balance
from lowlevel.data.report import not_learned, template_lines, truncated
from lowlevel.durable import replaced_folder, write_json
from lowlevel.methods.dpo import reads_reference
from lowlevel.model.adapters import save_adapter
from lowlevel.model.base import base_location, describe_base, notes_of_base
from lowlevel.model.dequantised import describe
from lowlevel.model.merging import write_stacked_adapter
from lowlevel.model.placement import dtype_name
from lowlevel.model.policy import TRAINED, Policy, quantised_weights
from lowlevel.optim.train_state import TrainState
from lowlevel.ranks import ALONE, Ranks
from lowlevel.running.assembly import Inputs
from lowlevel.running.job import Job
from lowlevel.running.plots import plot_loss
from lowlevel.running.result_files import complete_result
from lowlevel.running.run_folder import RunFolder, environment

NEARLY_ALL = 0.95  # share of weights in 4 bits below which a note is printed; norms and routers stay in 16 bits


def write_start(folder: RunFolder, job: Job, step: int) -> None:
    """Write the files that describe a run: before its first step, and again after --allow-change."""
    config, inputs, precision = job.config, job.inputs, job.inputs.placement.precision
    device: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads(), "precision": precision}
    if inputs.placement.device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        device |= {"device": torch.cuda.get_device_name(), "compute_capability": capability, "cuda": torch.version.cuda}
    device |= {"ranks": job.ranks.size} if job.ranks.size > 1 else {}
    folder.write_config(config)
    write_json(folder.path / "environment.json", environment(device))
    write_json(folder.path / "data_report.json", inputs.data.report.to_json())
    write_row_digests(folder.path, inputs.data)
    write_json(folder.path / "manifest.json", job.manifest)
    if inputs.parent:
        files = [path for path in sorted(inputs.parent.iterdir()) if path.name.startswith("adapter_")]
        with replaced_folder(folder.parent) as target:
            for path in filter(Path.is_file, files):
                shutil.copyfile(path, target / path.name)
    folder.write_status("running", step)


def announce(
    console: Console, config: RunConfig, inputs: Inputs, policy: Policy, order: DataOrder, ranks: Ranks = ALONE
) -> None:
    """Print model, adapter, data and device of the run."""
    train, placement = config.train, inputs.placement
    device = torch.cuda.get_device_name() if placement.device.type == "cuda" else "CPU"
    base = describe_base(config.model)
    off = f"off ({config.method}.disable_dropout)"
    dropout = off if config.own.disable_dropout else f"{config.lora.lora_dropout:g}"
    kind, more = ("weights", "all of them") if config.full else ("adapter", f"dropout {dropout}")
    console.print(
        f"{config.method}: {config.model.name}, {base}, {placement.precision} on {device}\n"
        f"  attention  {inputs.attention.reason}\n"
        f"  {kind:10} {policy.flat.weights.numel():,} trainable parameters, {more}\n"
        f"  data       {order.num_rows:,} examples, {order.total_steps(train):,} steps of "
        f"{train.per_device_train_batch_size} x {train.gradient_accumulation_steps}",
        markup=False,
    )
    if ranks.size > 1:
        what = "GPUs" if placement.device.type == "cuda" else "processes"
        each = f"{config.rows_per_step} examples a step as on one, its micro-batches are shared out"
        if not config.data.packing and train.gradient_accumulation_steps < ranks.size:
            each += f": {train.gradient_accumulation_steps}, so some have nothing to do"
        console.print(f"  ranks      {ranks.size} {what}; {each}", markup=False, highlight=False)
    if config.data.names == "demo" != config.model.name:
        console.print("  warning    data.source is not given: the rows are those of the built-in demo", markup=False)
    for part in inputs.data.report.train.sources:
        console.print(f"  source     {part.source}: {part} of the examples", markup=False, highlight=False)
    if config.model.load_in_4bit:
        if line := describe(policy, train.dequantize_once):
            console.print(f"  weights    {line}", markup=False, highlight=False, soft_wrap=True)
        quantised, total = quantised_weights(policy)
        if quantised < NEARLY_ALL * total:
            console.print(
                f"  note       {quantised / total:.0%} of the base is in 4 bits, {quantised:,} of {total:,} weights "
                f"outside embedding and LM head: only linear layers are quantised, the rest (experts) stays "
                f"{dtype_name(placement.dtype)}",
                markup=False,
            )
    for read_as in dict.fromkeys(split.read_as for split in inputs.data.report.splits.values() if split.read_as):
        console.print(f"  rows       read as {read_as}", markup=False, highlight=False)
    if config.method == "kto":
        console.print(f"  labels     {balance(inputs.data.train, config.kto)}", markup=False, highlight=False)
    for line in template_lines(inputs.data.report):
        console.print(f"  {line}", markup=False, highlight=False)
    for line in notes_of_base(config.model, policy.causal_lm.config):
        console.print(f"  note       {line}", markup=False, highlight=False, soft_wrap=True)
    for line in truncated(inputs.data.report):
        console.print(f"  truncation {line}", markup=False, highlight=False)
    for line in not_learned(inputs.data.report):
        console.print(f"  warning    {line}", markup=False, highlight=False)
    if config.sampled:
        console.print(f"  sampled    {config.loss_line}", markup=False)
    if config.has_reference:
        reference = f"base + {config.model.adapter} (frozen)" if inputs.parent else "base"
        if policy.untrained:
            reference += f", a frozen copy of {policy.untrained.nbytes / 2**20:,.0f} MiB"
        reference += f", moving: {policy.moving.following}" if policy.moving else ""
        reference = reference if reads_reference(config) else "none"
        console.print(f"  reference  {reference}; {config.loss_line}", markup=False)
    elif config.method == "reward":
        console.print(f"  loss       {config.loss_line}", markup=False)


def write_finish(folder: RunFolder, job: Job, state: TrainState, mode: str, console: Console) -> dict[str, Any]:
    """Write the trained adapter, summary, plot and status of a run after its last step; return the summary.

    `mode` is the execution mode of the last steps: the configured one, or a simpler fallback.
    """
    config, model = job.config, job.config.model
    with replaced_folder(folder.whole if config.full else folder.adapter) as target:
        name, revision, policy = base_location(model.name), model.revision, job.policy
        save_adapter(policy.model, TRAINED, target, name, revision, start=policy.start)
        complete_result(target, job.inputs.tokenizer, folder, config, "full" if config.full else "adapter")
    if folder.parent.exists():
        with replaced_folder(folder.stacked) as target:
            write_stacked_adapter(folder.parent, folder.adapter, target)
            complete_result(target, job.inputs.tokenizer, folder, config, "stacked")
    summary = {
        "train_runtime": state.seconds,
        "train_samples_per_second": state.examples / state.seconds,
        "train_steps_per_second": state.step / state.seconds,
        "train_loss": state.total.means()["loss"],
        "epoch": state.step / job.order.steps_per_epoch,
        "num_tokens": state.num_tokens,
        "skipped_steps": state.loss_scale.skipped_steps,
        "execution": mode,
        **({"ranks": job.ranks.size} if job.ranks.size > 1 else {}),
    }
    write_json(folder.path / "summary.json", summary)
    plot_loss(folder.read_metrics(), folder.path / "loss.png", title=f"{config.method}: {folder.path.name}")
    folder.write_status("finished", state.step, exit_code=0)
    lines = [
        f"finished: {state.step:,} steps in {state.seconds:.1f} s, mean loss {summary['train_loss']:.4f}, "
        f"{state.num_tokens / state.seconds:,.0f} tokens/s; {folder.adapter.name} in {folder.adapter}",
        "next:",
        *(f"  {command}" for command in next_commands(folder, config, state.step)),
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    return summary


def next_commands(folder: RunFolder, config: RunConfig, step: int) -> list[str]:
    """Useful commands after a run, quoted for the shell."""
    run = shlex.quote(str(folder.path))
    if config.method == "reward":
        pairs = config.data.eval_source or config.data.source
        return [f"lowlevel score {run} --data {shlex.quote(str(pairs))}", f"lowlevel inspect {run} --step {step}"]
    reply, look = f'lowlevel generate {run} --prompt "Hello"', f"lowlevel inspect {run} --step {step}"
    if config.sampled:
        return [reply, f"lowlevel merge {run} --out {run}-merged", look]
    if config.has_reference or config.full:
        compare, merge = f"lowlevel compare {run}", f"lowlevel merge {run} --out {run}-merged"
        other = [] if config.full else [merge]
        return [reply, *([compare] if config.data.eval_source else other), look]
    model = config.model.model_dump(exclude_defaults=True)  # base and quantisation must match the adapter
    flags = [f"--model.{key} {_flag(value)}" for key, value in model.items()]
    data = config.data.model_dump(exclude_defaults=True, include={"chat_template_from", "max_length"})
    flags += [f"--data.{key} {_flag(value)}" for key, value in data.items()]
    rows = [] if config.data.names == "demo" else ["--data.source pairs.jsonl"]
    out = f"--train.output_dir {run}-dpo"
    adapter = f"--model.adapter {run}{' --model.adapter_mode original' if config.lora.use_dora else ''}"
    return [reply, " ".join(["lowlevel dpo", *flags, adapter, *rows, out]), look]


def _flag(value: Any) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
