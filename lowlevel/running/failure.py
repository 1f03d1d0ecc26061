"""The report on a loss or gradient that was not finite, in a run's `failure/`; forensics.py finds what is in it.

failure/failure.json                step, data rows, loss scales tried, the first module, and how to replay the step
failure/micro-batch.safetensors     the micro-batch in which it was found
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lowlevel.batch.layout import PackedBatch
from lowlevel.durable import replaced_folder, write_json
from lowlevel.errors import EVAL_LOSS

BACKWARD = "backward"


@dataclass(frozen=True)
class Finding:
    """The first tensor that was not finite."""

    where: str  # "forward of the policy", "forward of the reference" or BACKWARD
    module: str  # its name in the model, "lm_head", or "the loss"
    what: str
    data_rows: tuple[int, ...] = ()  # of the positions that are not finite
    inputs: tuple[dict[str, Any], ...] = ()  # largest absolute values of the module's input
    weights: tuple[str, ...] = ()  # names of the module's own weights that are not finite


@dataclass(frozen=True)
class FailureReport:
    """Content of failure.json, and the micro-batch."""

    step: int  # counted from 1, as in the log
    quantity: str  # "loss", "gradient norm" or EVAL_LOSS
    value: float
    data_rows: tuple[int, ...]  # of the whole step, or the held-out rows
    attempts: tuple[dict[str, float], ...]  # loss scale, loss and gradient norm, oldest first
    micro_batch: int | None = None
    finding: Finding | None = None
    notes: tuple[str, ...] = ()
    batch: PackedBatch | None = None

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation failed: forward passes without dropout, no step to replay."""
        return self.quantity == EVAL_LOSS

    @property
    def sentence(self) -> str:
        """The finding as part of a one-line error."""
        if self.finding is None:
            return "; ".join(self.notes) or "nothing else was found"
        rows = f", data rows {list(self.finding.data_rows)}" if self.finding.data_rows else ""
        return f"first not finite: {self.finding.what} ({self.finding.where}, micro-batch {self.micro_batch}{rows})"

    def to_json(self, run_dir: Path) -> dict[str, Any]:
        """Plain values; NaN and infinity as text."""
        found = self.finding or Finding("", "", "")
        return {
            "step": self.step,
            "quantity": self.quantity,
            "value": str(self.value),
            "data_rows": list(self.data_rows),
            "loss_scale_history": [{k: _plain(v) for k, v in attempt.items()} for attempt in self.attempts],
            "micro_batch": self.micro_batch,
            "micro_batch_rows": list(self.batch.data_rows) if self.batch else [],
            **{key: vars(found)[key] or None for key in ("where", "module", "what")},
            "damaged_rows": list(found.data_rows),
            "inputs": [{k: _plain(v) for k, v in value.items()} for value in found.inputs],
            "weights_not_finite": list(found.weights),
            "notes": list(self.notes),
            "replay": None if self.evaluates else f"lowlevel replay {shlex.quote(str(run_dir))} --step {self.step}",
        }


def write_failure(report: FailureReport, run_dir: Path) -> Path:
    """Write `failure/` in a run folder, complete or not at all; replaces an older one."""
    target = run_dir / "failure"
    with replaced_folder(target) as folder:
        write_json(folder / "failure.json", report.to_json(run_dir))
        if report.batch is not None:
            tensors = {name: tensor.contiguous() for name, tensor in report.batch.tensors().items()}
            save_file(tensors, folder / "micro-batch.safetensors")
    return target


def _plain(value: Any) -> Any:
    return value if not isinstance(value, float) or abs(value) < float("inf") else str(value)
