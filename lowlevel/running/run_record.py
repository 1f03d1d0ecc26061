"""Files and printed lines of a run before its first step and after its last."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lowlevel.batch.order import DataOrder
from lowlevel.checkpoints.row_digests import write_row_digests
from lowlevel.config.schema import RunConfig
from lowlevel.data.report import not_learned, template_lines, truncated
from lowlevel.durable import replaced_folder, write_json
from lowlevel.errors import how_many
from lowlevel.methods.kto import balance
from lowlevel.model.adapters import save_adapter
from lowlevel.model.base import base_location, describe_base, notes_of_base
from lowlevel.model.dequantised import describe, quantised_weights
from lowlevel.model.merging import write_stacked_adapter
from lowlevel.model.moving_reference import reads_reference
from lowlevel.model.placement import dtype_name
from lowlevel.model.policy import TRAINED, Policy
from lowlevel.optim.train_state import TrainState
from lowlevel.ranks import ALONE, Ranks
from lowlevel.running.assembly import Inputs
from lowlevel.running.job import Job
from lowlevel.running.machine import ENVIRONMENT, environment
from lowlevel.running.plots import plot_loss
from lowlevel.running.progress import EQUAL_REWARDS
from lowlevel.running.result_files import complete_result
from lowlevel.running.run_folder import RunFolder

NEARLY_ALL = 0.95  # share of weights in 4 bits below which a note is printed; norms and routers stay in 16 bits


def write_start(folder: RunFolder, job: Job, step: int) -> None:
    """Write the files that describe a run: before its first step, and again after --allow-change."""
    config, inputs = job.config, job.inputs
    folder.write_config(config)
    write_json(folder.path / ENVIRONMENT, environment(inputs.placement, job.ranks.size))
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
    placement = inputs.placement
    device = torch.cuda.get_device_name() if placement.device.type == "cuda" else "CPU"
    base = describe_base(config.model)
    console.print(f"{config.method}: {config.model.name}, {base}, {placement.precision} on {device}", markup=False)
    of_model = _said_of_model(config, inputs, policy, order, ranks)
    for label, text in chain(of_model, _said_of_data(config, inputs), _said_of_loss(config, inputs, policy)):
        console.print(f"  {label:10} {text}", markup=False, highlight=False, soft_wrap=True)


def _said_of_model(
    config: RunConfig, inputs: Inputs, policy: Policy, order: DataOrder, ranks: Ranks
) -> Iterator[tuple[str, str]]:
    train, dtype = config.train, inputs.placement.dtype
    off = "off: completions are sampled without" if config.sampled else f"off ({config.method}.disable_dropout)"
    dropout = off if config.own.disable_dropout else f"{config.lora.lora_dropout:g}"
    kind, more = ("weights", "all of them") if config.full else ("adapter", f"dropout {dropout}")
    batches = f"{train.per_device_train_batch_size} x {train.gradient_accumulation_steps}"
    yield "attention", inputs.attention.reason
    yield kind, f"{policy.flat.weights.numel():,} trainable parameters, {more}"
    yield "data", f"{how_many(order.num_rows, 'examples')}, {how_many(order.total_steps(train), 'steps')} of {batches}"
    if ranks.size > 1:
        what = "GPUs" if inputs.placement.device.type == "cuda" else "processes"
        shared = {"prompts": config.prompts_per_step} if config.sampled else {}
        shared["micro-batches"] = ranks.size if config.data.packing else train.gradient_accumulation_steps
        few = " and ".join(how_many(count, name) for name, count in shared.items() if count < ranks.size)
        each = f"{how_many(config.rows_per_step, 'examples')} a step as on one, {' and '.join(shared)} are shared out"
        each += f": {few}, so some have nothing to do" if few else ""
        if ranks.sharded:
            each += f"; each holds 1/{ranks.size} of every layer (train.shard_base), without CUDA graphs"
        yield "ranks", f"{ranks.size} {what}; {each}"
    if config.model.load_in_4bit:
        if line := describe(policy, False if ranks.sharded else train.dequantize_once):
            yield "weights", line
        quantised, total = quantised_weights(policy)
        if quantised < NEARLY_ALL * total:
            yield (
                "note",
                f"{quantised / total:.0%} of the base is in 4 bits, {quantised:,} of {total:,} weights outside "
                f"embedding and LM head: only linear layers are quantised, others (experts) stay {dtype_name(dtype)}",
            )
    for line in notes_of_base(config.model, policy.causal_lm.config):
        yield "note", line


def _said_of_data(config: RunConfig, inputs: Inputs) -> Iterator[tuple[str, str]]:
    report = inputs.data.report
    if config.data.names == "demo" != config.model.name:
        yield "warning", 'data.source is "demo", the default: the rows are those of the built-in demo'
    for part in report.train.sources:
        yield "source", f"{part.source}: {part} of the examples"
    for read_as in dict.fromkeys(split.read_as for split in report.splits.values() if split.read_as):
        yield "rows", f"read as {read_as}"
    if config.method == "kto":
        yield "labels", balance(inputs.data.train, config.kto)
    for line in template_lines(report):
        label, _, text = line.partition(" ")
        yield label, text.lstrip()
    for line in truncated(report):
        yield "truncation", line
    for line in not_learned(report):
        yield "warning", line
    if report.overlap:
        yield "warning", f"{report.overlap:,} evaluation prompts are also trained on"


def _said_of_loss(config: RunConfig, inputs: Inputs, policy: Policy) -> Iterator[tuple[str, str]]:
    if config.sampled:
        yield "sampled", config.loss_line
    if config.has_reference:
        reference = f"base + {config.model.adapter} (frozen)" if inputs.parent else "base"
        if policy.untrained:
            reference += f", a frozen copy of {policy.untrained.nbytes / 2**20:,.0f} MiB"
        reference += f", moving: {policy.moving.following}" if policy.moving else ""
        loss = "" if config.sampled else f"; {config.loss_line}"  # said above
        yield "reference", f"{reference if reads_reference(config) else 'none'}{loss}"
    elif config.method == "reward":
        yield "loss", config.loss_line


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
        f"finished: {how_many(state.step, 'steps')} in {state.seconds:.1f} s, mean loss {summary['train_loss']:z.4f}, "
        f"{state.num_tokens / state.seconds:,.0f} tokens/s; {folder.adapter.name} in {folder.adapter}",
        *equal_rewards(folder.read_metrics(), config),
        "next:",
        *(f"  {command}" for command in next_commands(folder, config, state.step)),
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    return summary


def equal_rewards(records: list[dict[str, Any]], config: RunConfig) -> Iterator[str]:
    """A line if more than half of the prompts taught nothing, because all of their completions had the same reward."""
    logged = [(record["step"], record[EQUAL_REWARDS]) for record in records if EQUAL_REWARDS in record]
    if config.method == "ppo" or not logged:
        return
    steps, shares = zip(*logged, strict=True)
    share = float(np.average(shares, weights=np.diff(steps, prepend=0)))
    if share > 0.5:
        sft = "" if config.model.adapter else "begin from an SFT run (--model.adapter), "
        raised = f"raise {config.method}.num_generations or {config.method}.temperature"
        prompts = "take prompts that are answered right sometimes (easier ones if the reward is low)"
        yield f"equal rewards in {share:.0%} of prompts: nothing is learned from them; {sft}{prompts}, or {raised}"


def next_commands(folder: RunFolder, config: RunConfig, step: int) -> list[str]:
    """Useful commands after a run, quoted for the shell."""
    run, given = shlex.quote(str(folder.path)), config.data.given
    reply = f'lowlevel generate {run} --prompt "Hello"'
    look = [] if given else [f"lowlevel inspect {run} --step {step} --html {run}/step-{step}.html"]
    if config.method == "reward":
        pairs = "pairs.jsonl" if given else shlex.quote(str(config.data.parts[0].source))
        return [f"lowlevel score {run} --data {pairs}", *look]
    if config.sampled:
        return [reply, f"lowlevel merge {run} --out {run}-merged", *look]
    if config.has_reference or config.full:
        compare, merge = f"lowlevel compare {run}", f"lowlevel merge {run} --out {run}-merged"
        other = [] if config.full else [merge]
        return [reply, *([compare] if config.data.eval_source and not given else other), *look]
    model = config.model.model_dump(exclude_defaults=True)  # base and quantisation must match the adapter
    flags = [f"--model.{key} {_flag(value)}" for key, value in model.items()]
    data = config.data.model_dump(exclude_defaults=True, include={"chat_template_from", "max_length"})
    flags += [f"--data.{key} {_flag(value)}" for key, value in data.items()]
    rows = [] if config.data.names == "demo" else ["--data.source pairs.jsonl"]
    out = f"--train.output_dir {run}-dpo"
    adapter = f"--model.adapter {run}{' --model.adapter_mode original' if config.lora.use_dora else ''}"
    return [reply, " ".join(["lowlevel dpo", *flags, adapter, *rows, out]), *look]


def _flag(value: Any) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
