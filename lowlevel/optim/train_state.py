"""Training state on the host: counters, sums since the last logged line, and what a checkpoint keeps of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lowlevel.optim.loss_scale import LossScale


@dataclass
class Window:
    """Sums over steps, divided once when they are read."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, sums: dict[str, float], count: int) -> None:
        """Add sums over `count` tokens or pairs."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += count

    def means(self) -> dict[str, float]:
        """Each sum divided by the count."""
        return {name: value / self.count for name, value in self.sums.items()}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, as host numbers."""

    metrics: dict[str, float]  # "loss" and what the method reports: means over the step's count
    grad_norm: float  # before clipping
    count: int  # supervised tokens or pairs
    examples: int
    num_tokens: int
    supervised_tokens: int
    positions: int  # computed: num_tokens and padding


@dataclass
class TrainState:
    """All that changes during training beside weights and optimizer state. `step` counts applied updates."""

    loss_scale: LossScale
    step: int = 0
    num_tokens: int = 0
    supervised_tokens: int = 0
    examples: int = 0
    window: Window = field(default_factory=Window)
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
        self.examples += result.examples
        self.window_tokens += result.num_tokens
        self.window_positions += result.positions
        self.window_seconds += seconds
        self.seconds += seconds
        self.grad_norm = result.grad_norm
        self.window.add({name: value * result.count for name, value in result.metrics.items()}, result.count)
        self.total.add({"loss": result.metrics["loss"] * result.count}, result.count)

    def close_window(self, rate: float, epoch: float) -> dict[str, Any]:
        """The record of a logged step; starts the next window."""
        record = {
            "step": self.step,
            **self.window.means(),
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
        self.window, self.window_tokens, self.window_positions, self.window_seconds = Window(), 0, 0, 0.0
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
        """Plain values; floats survive JSON exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> TrainState:
        """What `to_json` gave."""
        windows = {name: Window(**saved[name]) for name in ("window", "total")}
        return cls(**{**saved, **windows, "loss_scale": LossScale(**saved["loss_scale"])})


def peak_memory() -> dict[str, float]:
    """Peaks of the CUDA allocator in GiB; 0 on a CPU. Paged optimizer state is not in them."""
    if not torch.cuda.is_available():
        return {"peak_allocated_gib": 0.0, "peak_reserved_gib": 0.0}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
