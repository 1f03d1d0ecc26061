"""Training state on the host: counters, sums since the last logged line, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.losses import LossSums
from lowlevel.losses.sums import LARGEST, by_label
from lowlevel.optim.loss_scale import LossScale


@dataclass
class Window:
    """Sums over steps, divided once when they are read."""

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0  # whole, unless tokens have weights

    def add(self, sums: dict[str, float], count: float) -> None:
        """Add sums over `count` tokens or pairs."""
        for name, value in sums.items():
            largest = name.endswith(LARGEST)
            self.sums[name] = max(self.sums.get(name, value), value) if largest else self.sums.get(name, 0.0) + value
        self.count += count

    def means(self) -> dict[str, float]:
        """Each sum divided by the count."""
        return {n: value if n.endswith(LARGEST) else value / self.count for n, value in self.sums.items()}


@dataclass(frozen=True)
class StepResult:
    """One applied optimizer step: numbers on the host, its micro-batches and their results."""

    step: int  # counted from 1
    means: dict[str, float]  # "loss" and the method's metrics, over `count`
    grad_norm: float  # l2 norm before clipping
    learning_rate: float
    count: float  # supervised tokens (sft; the sum of their weights, if they have any), pairs (dpo) or examples (kto)
    batches: tuple[PackedBatch, ...] = field(repr=False)  # on the CPU
    sums: tuple[LossSums, ...] = field(repr=False)  # of each micro-batch, on the device, before the update

    @property
    def metrics(self) -> dict[str, float]:
        """The means as they are logged; kto's are over the examples of a label."""
        return by_label(self.means)

    @property
    def loss(self) -> float:
        """Mean over `count`."""
        return self.means["loss"]

    @property
    def rows(self) -> list[int]:
        """The data row of each example."""
        return [row for batch in self.batches for row in batch.data_rows]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(batch.num_tokens for batch in self.batches)

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a loss."""
        return sum(batch.num_scored for batch in self.batches)

    @property
    def positions(self) -> int:
        """Computed positions: tokens and padding."""
        return sum(batch.input_ids.numel() for batch in self.batches)

    @property
    def examples(self) -> dict[str, Tensor]:
        """Loss, log-probabilities and rewards of each example, (P,) by name, in the order of `rows`.

        Empty unless the step was taken with details.
        """
        names = self.sums[0].examples
        sizes = [len(batch.data_rows) for batch in self.batches]
        return {n: torch.cat([s.examples[n][:size] for s, size in zip(self.sums, sizes, strict=True)]) for n in names}

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Values of each scored token, (N,) by name: "logps", "ref_logps", "ids" and "rows" (data rows).

        In each micro-batch, tokens of chosen completions come before those of rejected ones. Empty without details.
        """
        parts: dict[str, list[Tensor]] = {}
        if not self.sums[0].tokens:  # without details, several GPUs keep their own micro-batches only
            return {}
        for batch, sums in zip(self.batches, self.sums, strict=True):
            order = batch.sequence_ids[batch.belongs].argsort(stable=True)
            places = batch.belongs.nonzero()[:, 0][order]
            rows = torch.tensor(batch.data_rows)[batch.sequence_ids[places] % len(batch.real)]
            own = {"ids": batch.scored_targets[places], "rows": rows}
            for name, values in (own | {n: v.cpu()[places] for n, v in sums.tokens.items()}).items():
                parts.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in parts.items()}


def totals(sums: Sequence[LossSums]) -> Mapping[str, Tensor]:
    """Loss and metrics summed over micro-batches."""
    named = [one.named() for one in sums]
    parts = {name: torch.stack([one[name] for one in named]) for name in named[0]}
    return {name: part.max() if name.endswith(LARGEST) else part.sum() for name, part in parts.items()}


def on_host(
    totals: Mapping[str, Tensor], count: float, norm: Tensor, more: Tensor
) -> tuple[dict[str, float], float, list[float]]:
    """Means of a step's loss and metrics over its count, the gradient's norm, and `more`; waits for the device once."""
    means = [total if name.endswith(LARGEST) else total / count for name, total in totals.items()]
    values = torch.cat([torch.stack([*means, norm]), more]).tolist()
    return dict(zip(totals, values, strict=False)), values[len(totals)], values[len(totals) + 1 :]


@dataclass
class TrainState:
    """Everything that changes during training besides weights and optimizer state; `step` counts applied updates."""

    loss_scale: LossScale
    step: int = 0
    num_tokens: int = 0
    supervised_tokens: int = 0
    examples: int = 0
    window: Window = field(default_factory=Window)
    facts: Window = field(default_factory=Window)  # of completions: each step counts once, however many tokens it has
    window_tokens: int = 0
    window_positions: int = 0
    window_seconds: float = 0.0
    total: Window = field(default_factory=Window)
    grad_norm: float = 0.0
    seconds: float = 0.0  # spent in training steps, over all resumes
    best_eval_loss: float | None = None
    evals_without_gain: int = 0
    stopped_early: bool = False

    def record(self, result: StepResult, seconds: float) -> None:
        """Count one applied step; its means become sums again, so that steps weigh by their count."""
        self.step += 1
        self.num_tokens += result.num_tokens
        self.supervised_tokens += result.supervised_tokens
        self.examples += len(result.rows)
        self.window_tokens += result.num_tokens
        self.window_positions += result.positions
        self.window_seconds += seconds
        self.seconds += seconds
        self.grad_norm = result.grad_norm
        sums = {n: v if n.endswith(LARGEST) else v * result.count for n, v in result.means.items()}
        self.window.add(sums, result.count)
        self.facts.add(dict(result.batches[0].facts), 1)
        self.total.add({"loss": result.loss * result.count}, result.count)

    def close_window(self, rate: float, epoch: float) -> dict[str, Any]:
        """Return the record of a logged step, and start the next window."""
        record = {
            "step": self.step,
            **by_label(self.window.means()),
            **self.facts.means(),
            "grad_norm": self.grad_norm,
            "learning_rate": rate,
            "loss_scale": self.loss_scale.scale,
            "skipped_steps": self.loss_scale.skipped_steps,
            "epoch": epoch,
            "num_tokens": self.num_tokens,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_second": self.window_tokens / self.window_seconds,
            "padding_share": 1.0 - self.window_tokens / self.window_positions,
            **peak_memory(),
        }
        self.window, self.facts = Window(), Window()
        self.window_tokens, self.window_positions, self.window_seconds = 0, 0, 0.0
        return record

    def judge(self, eval_loss: float, patience: int | None) -> None:
        """Count evaluations without a better loss; stop after `patience` of them."""
        if self.best_eval_loss is None or eval_loss < self.best_eval_loss:
            self.best_eval_loss, self.evals_without_gain = eval_loss, 0
        else:
            self.evals_without_gain += 1
        self.judge_patience(patience)

    def judge_patience(self, patience: int | None) -> None:
        """Stop early after `patience` evaluations without an improvement."""
        self.stopped_early = patience is not None and self.evals_without_gain >= patience

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, which keeps floats exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> TrainState:
        """The inverse of `to_json`."""
        windows: dict[str, Any] = {n: Window(**saved[n]) for n in ("window", "total", "facts") if n in saved}
        return cls(**{**saved, **windows, "loss_scale": LossScale(**saved["loss_scale"])})


def peak_memory() -> dict[str, float]:
    """Peaks of the CUDA allocator in GiB, without paged optimizer state; 0 on a CPU."""
    gpu = torch.cuda.is_available()
    allocated, reserved = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if gpu else (0, 0)
    return {"peak_allocated_gib": allocated / 2**30, "peak_reserved_gib": reserved / 2**30}
