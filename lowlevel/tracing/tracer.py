"""Collects the values that a step computed for its examples, and writes them at checkpoints.

At pair level, tracing a step costs one copy of some hundred bytes to the host, just before the loop's own host sync.
Parquet files are written only at checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.checkpoints.tables import write_table
from lowlevel.config.schema import RunConfig
from lowlevel.losses import LossSums
from lowlevel.methods import Method
from lowlevel.methods.dpo import DPO, kept_pair_logps, reward_slopes
from lowlevel.model.policy import Policy
from lowlevel.tracing.gradients import measure

FLUSH_VALUES = 2**22  # numbers held on the host before they are written between two checkpoints
LOGPS = {  # by the names of PairLogps
    "chosen_logps": "logps/chosen",
    "rejected_logps": "logps/rejected",
    "ref_chosen_logps": "logps/ref_chosen",
    "ref_rejected_logps": "logps/ref_rejected",
}
REWARDS = {"chosen_reward": "rewards/chosen", "rejected_reward": "rewards/rejected", "margin": "rewards/margins"}
BUILT_IN = {"loss", "rewards/accuracies", *LOGPS.values(), *REWARDS.values()}
Columns = dict[str, Any]  # sequences or (n,) arrays by column


class Tracer:
    """The rows of traced steps: collected step by step, written by `flush`."""

    def __init__(self, config: RunConfig, policy: Policy, method: Method, folder: Path | None) -> None:
        """`folder` is the run's trace folder; it is created with the first file. None: nothing is kept (of several
        GPUs, the first one writes).
        """
        trace = config.trace
        self.every, self.steps = trace.every, frozenset(trace.steps)
        self.token_level, self.with_gradients = trace.level == "token", trace.gradients
        self.policy, self.method, self.folder = policy, method, folder
        self._taken: dict[int, dict[str, list[Columns]]] = {}  # by step and kind
        self._values = 0

    def wants(self, steps_done: int) -> bool:
        """Whether the next step, `steps_done + 1` as the log counts, is traced."""
        step = steps_done + 1
        return step in self.steps or (self.every is not None and step % self.every == 0)

    def take(
        self, steps_done: int, batches: Sequence[PackedBatch], sums: Sequence[LossSums], scale: float, dropout_key: int
    ) -> None:
        """Copy the values of a step, after its backward passes. A step that is repeated after an fp16 overflow
        replaces its earlier values.

        Args:
            steps_done: applied steps before this one.
            batches: the step's micro-batches, on the CPU.
            sums: the result of each, with details.
            scale: loss scale of the gradient in `policy.flat.grad`, which is not yet unscaled or clipped.
            dropout_key: of the step, for the additional backward pass of trace.gradients.
        """
        if self.folder is None:
            return
        step, parts = steps_done + 1, list(zip(batches, _to_host(sums), strict=True))
        if step not in self._taken and self._values > FLUSH_VALUES:
            self.flush()
        kind = "pairs" if isinstance(self.method, DPO) else "examples"
        rows = [self._rows(step, number, *part) for number, part in enumerate(parts)]
        total = sum(float(np.sum(part["loss"], dtype=np.float64)) for part in rows)
        loss, unit = total / sum(map(self.method.count, batches)), self.method.unit
        size = sum(batch.num_scored if unit == "tokens" else len(batch.data_rows) for batch in batches)
        line: Columns = {"step": [step], "loss": [loss], unit: [size], "loss_scale": [scale]}
        if batches[0].kl is not None:
            line["kl"] = [float(batches[0].kl)]
        if self.with_gradients:
            line |= measure(self.policy, self.method, parts, scale, dropout_key)
        self._taken[step] = {kind: rows, "steps": [line]}
        self._values += sum(part.numel() for _, one in parts for part in (*one.examples.values(), *one.tokens.values()))

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.flush()  # of a failed run, with the failing step; an error here would hide the run's own

    def flush(self) -> None:
        """Write the rows since the last flush, one file for each kind."""
        parts: dict[str, list[Columns]] = {}
        for step in sorted(self._taken):
            for kind, rows in self._taken[step].items():
                parts.setdefault(kind, []).extend(rows)
        for kind, rows in parts.items():
            columns = {name: [value for part in rows for value in part[name]] for name in rows[0]}
            assert self.folder is not None
            write_table(self.folder, kind, columns)
        self._taken, self._values = {}, 0

    def _rows(self, step: int, number: int, batch: PackedBatch, kept: LossSums) -> Columns:
        size = len(batch.data_rows)
        head: Columns = {"step": [step] * size, "row": batch.data_rows, "micro_batch": [number] * size}
        if isinstance(self.method, DPO):
            return head | self._pair_columns(self.method, batch, kept)
        columns: Columns = {"length": _lengths(batch, 0)} if kept.tokens else {}
        columns |= {name: values[:size].numpy() for name, values in kept.examples.items()}
        return head | columns | (_token_columns(batch, kept, "", 0) if self.token_level else {})

    def _pair_columns(self, method: DPO, batch: PackedBatch, kept: LossSums) -> Columns:
        size, half = len(batch.data_rows), len(batch.lengths) // 2  # filled batches contain dummy pairs
        examples = {name: values[:size].numpy() for name, values in kept.examples.items()}
        logps = {name: examples[source] for name, source in LOGPS.items()}
        slopes = reward_slopes(method.config, kept_pair_logps(batch, kept, method.columns))
        columns: Columns = {
            **logps,
            "chosen_length": _lengths(batch, 0),
            "rejected_length": _lengths(batch, half),
            "chosen_logratio": logps["chosen_logps"] - logps["ref_chosen_logps"],
            "rejected_logratio": logps["rejected_logps"] - logps["ref_rejected_logps"],
            **{name: examples[source] for name, source in REWARDS.items()},
            "weight": -slopes[0][:size].numpy(),
            "rejected_weight": slopes[1][:size].numpy(),
            "loss": examples["loss"],
            **{f"metrics/{name}": values for name, values in examples.items() if name not in BUILT_IN},
        }
        if self.token_level:
            columns |= _token_columns(batch, kept, "chosen_", 0) | _token_columns(batch, kept, "rejected_", half)
        return columns


def _to_host(sums: Sequence[LossSums]) -> list[LossSums]:
    """The same details on the CPU, in one copy."""
    tensors = [tensor for one in sums for part in (one.examples, one.tokens) for tensor in part.values()]
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors]).cpu()
    pieces = iter(flat.split([tensor.numel() for tensor in tensors]))
    details = [[{name: next(pieces) for name in part} for part in (one.examples, one.tokens)] for one in sums]
    return [replace(one, examples=new[0], tokens=new[1]) for one, new in zip(sums, details, strict=True)]


def _lengths(batch: PackedBatch, first: int) -> list[int]:
    """Numbers of scored tokens of the real examples' sequences, from sequence `first` on."""
    return [int(length) for length in batch.lengths[first : first + len(batch.data_rows)]]


def _token_columns(batch: PackedBatch, kept: LossSums, prefix: str, first: int) -> Columns:
    """Ids and log-probabilities of each sequence's scored tokens, in order."""
    sources: Mapping[str, Tensor] = {"token_ids": batch.scored_targets} | {
        name.replace("logps", "token_logps"): values for name, values in kept.tokens.items()
    }
    index = [np.asarray(batch.sequence_index[first + i, :length]) for i, length in enumerate(_lengths(batch, first))]
    return {prefix + name: [values.numpy()[where] for where in index] for name, values in sources.items()}
