"""Steps of every loss on one policy, one after the other in one process: how fast is a loss compared with DPO's?

    python -m benchmarks.loss_speed --out benchmarks/results/loss_speed_h200.csv

Shape, rows, batches (2x4 pairs; kto: the same pairs as twice as many rows) and mode of execution are those of
`benchmarks.step`'s DPO. All steps are taken once, which captures their shapes, and then timed; medians.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import ROWS_PER_STEP, select
from benchmarks.runner import commit
from benchmarks.workload import LENGTHS, case_config, workload_process
from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.execution import WithFallback
from lowlevel.loop import optimizer_step
from lowlevel.methods.choice import build_method
from lowlevel.model.policy import Policy
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.running.assembly import build_run_policy, check_run, choose_execution

LOSSES = ("sigmoid", "ipo", "simpo", "orpo", "cpo", "dpop", "kto", "sigmoid")  # DPO's first and last: what moved


def with_loss(config: RunConfig, loss: str) -> RunConfig:
    """The configuration with another loss; kto splits each pair into two rows."""
    tables = to_tables(config)
    del tables["dpo"]
    tables["train"]["execution"] = "auto"
    if loss != "kto":
        return config_from_tables({**tables, "dpo": {"loss_type": loss}}, loss)
    del tables["data"]["max_prompt_length"], tables["data"]["supervise"]
    size = 2 * config.train.per_device_train_batch_size
    tables["train"]["per_device_train_batch_size"] = size
    return config_from_tables({**tables, "method": "kto"}, loss)


def measure(policy: Policy, config: RunConfig, steps: int) -> dict[str, Any]:
    """Median seconds of a step, and the mode that it ran in."""
    config, inputs = check_run(config)
    method: Any = build_method(config, inputs.attention)
    rows = inputs.data.train
    trouble: list[str] = []
    execution = WithFallback(policy, method, choose_execution(config, inputs), trouble.append)
    optimizer = build_optimizer(policy.flat.weights, config.train)
    size = config.rows_per_step
    taken = [method.micro_batches(rows[start : start + size]) for start in range(0, steps * size, size)]
    scale, seconds = LossScale.for_precision(policy.placement.precision), []
    for timed in (False, True):
        for step, batches in enumerate(taken):
            began = time.perf_counter()
            optimizer_step(execution, optimizer, batches, scale, seed=0, step=step, max_grad_norm=1.0)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds += [time.perf_counter() - began] * timed
    return {"seconds_per_step": statistics.median(seconds), "mode": execution.mode, "trouble": "; ".join(trouble)}


def main() -> None:
    """Measure each loss and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, (case,) = Path(scratch), select(["lowlevel_dpo_2x4_eager"])
        workload_process(folder, options.shape, LENGTHS.get(options.shape, 512), options.steps * ROWS_PER_STEP, 300)
        config, inputs = check_run(case_config(case, folder, folder / "run", options.steps))
        policy, table = build_run_policy(config, inputs), list[dict[str, Any]]()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        for loss in options.losses:
            row = {"loss": loss, **measure(policy, with_loss(config, loss), options.steps)}
            first = table[0]["seconds_per_step"] if table else row["seconds_per_step"]
            row |= {
                "relative_to_first": row["seconds_per_step"] / first,
                "shape": options.shape,
                "steps": options.steps,
            }
            table.append({**row, "device": device, "torch": torch.__version__, "commit": commit()})
            with options.out.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(table[0]))
                writer.writeheader()
                writer.writerows(table)
            print(f"{loss:<10} {1000 * row['seconds_per_step']:9.2f} ms {row['relative_to_first']:6.3f} {row['mode']}")


if __name__ == "__main__":
    main()
