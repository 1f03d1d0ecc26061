"""One case in lowlevel, as `lowlevel sft` and `lowlevel dpo` run it: `python -m benchmarks.lowlevel_case JOB.json`."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import lowlevel.running.job
import lowlevel.running.training
from benchmarks.cases import Job
from benchmarks.memory import plan_text
from benchmarks.meter import Measured, Meter, work
from benchmarks.shapes import STEPS
from benchmarks.workload import by_step, case_config, peer_tokens
from lowlevel import __version__
from lowlevel.batch.order import DataOrder
from lowlevel.config.schema import RunConfig
from lowlevel.methods.choice import build_method, fitted
from lowlevel.running.assembly import Inputs, check_run
from lowlevel.running.progress import make_console
from lowlevel.running.run_folder import RunFolder


def run_metered(config: RunConfig, meter: Meter) -> tuple[list[dict[str, Any]], str]:
    """Run with the meter beside the loop: it is read at each step's end, before the step is logged.

    Returns:
        The logged records, and the mode of execution that the run ended in.
    """
    train, rehearse, progress = (
        lowlevel.running.training.train,
        lowlevel.running.job.rehearse,
        lowlevel.running.training.RunObserver.progress,
    )

    def metered_rehearse(*args: Any) -> dict[str, Any]:
        began = time.perf_counter()
        report = rehearse(*args)  # it waits for the device
        meter.rehearsal = time.perf_counter() - began
        return report

    def metered_train(*args: Any, **kwargs: Any) -> Any:
        meter.begin()
        yield from train(*args, **kwargs)

    def metered_progress(self: Any, *args: Any) -> None:
        meter.end_step()
        progress(self, *args)

    with (
        patch("lowlevel.methods.choice.fitted", fitted_as_recipe),
        patch("lowlevel.running.job.rehearse", metered_rehearse),
        patch("lowlevel.running.training.train", metered_train),
        patch("lowlevel.running.training.RunObserver.progress", metered_progress),
    ):
        summary = lowlevel.running.training.run_training(config, make_console(), restart=True)
    return [r for r in RunFolder(Path(config.train.output_dir)).read_metrics() if "loss" in r], summary["execution"]


def fitted_as_recipe(method: Any, config: RunConfig, examples: Any) -> Any:
    """The shapes of a run as long as the recipe's, for which the measured steps stand."""
    train = config.train.model_copy(update={"max_steps": STEPS[config.method]})
    return fitted(method, config.model_copy(update={"train": train}), examples)


def count(config: RunConfig, inputs: Inputs, steps: int) -> tuple[list[int], int, int]:
    """Tokens of each step as the peers count them; positions of all steps without and with padding."""
    examples = inputs.data.train
    method = fitted_as_recipe(build_method(config, inputs.attention), config, examples)
    per_step = config.rows_per_step
    order = DataOrder(len(examples), per_step, config.train.seed, config.train.data_order == "shuffled")
    rows = [[examples[i] for i in order.step_rows(step)] for step in range(steps)]
    batches = [batch for step in rows for batch in method.micro_batches(step)]
    tokens = by_step([n for step in rows for n in peer_tokens(step, config.method)], per_step)
    return tokens, sum(b.num_tokens for b in batches), sum(b.input_ids.numel() for b in batches)


def measure(job: Job, meter: Meter) -> Measured:
    """Run the case and count what it did."""
    config = case_config(job.case, Path(job.workload), Path(job.scratch) / job.case.name, job.steps)
    records, mode = run_metered(config, meter)
    config, inputs = check_run(config)
    tokens, computed, positions = count(config, inputs, job.steps)
    if records[-1]["num_tokens"] != computed:
        raise ValueError(f"the run computed {records[-1]['num_tokens']} tokens, {computed} were counted")
    automatic = "graphed" if torch.cuda.is_available() else "eager"
    asked = automatic if job.case.execution == "auto" else job.case.execution
    trouble = "" if mode == asked else f"ran {mode}, not {asked}; see the log"
    losses = [r["loss"] for r in records]
    return Measured(__version__, tokens, losses, computed, positions, trouble, plan_text(config))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    work(measure)
