"""An inspection: what was looked at, with which weights, the records, and how they stand to what the run logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowlevel.config.schema import DPOConfig, RunConfig
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import settings
from lowlevel.inspection.records import PairRecord, SequenceRecord


@dataclass(frozen=True)
class Inspection:
    """Everything that terminal and page show; exactly one of `sequences` and `pairs` is not empty."""

    run: str  # name of the run folder
    subject: str  # "step 5" or "row 12"
    weights: str  # one line
    logged: str | None  # the loss that the run logged for this step, and over what
    pieces: TokenPieces
    dpo: DPOConfig
    sequences: tuple[SequenceRecord, ...] = ()
    pairs: tuple[PairRecord, ...] = ()

    @property
    def loss(self) -> float:
        """What the training loop would log: the sum over tokens (sft) or pairs (dpo), divided by their number."""
        records: Sequence[SequenceRecord | PairRecord] = self.sequences or self.pairs
        return float(torch.stack([record.loss for record in records]).double().sum()) / self.count

    @property
    def count(self) -> int:
        """Learned tokens (sft) or pairs (dpo)."""
        return len(self.pairs) or sum(len(record.tokens) for record in self.sequences)

    @property
    def headline(self) -> str:
        """What this is, in one line."""
        if self.pairs:
            return f"{self.run}, {self.subject}: {_count(len(self.pairs), 'pair')}, {settings(self.dpo)}"
        examples, tokens = _count(len(self.sequences), "example"), _count(self.count, "learned token")
        return f"{self.run}, {self.subject}: {examples}, {tokens}"

    @property
    def conditions(self) -> str:
        """Weights and dropout, in one line."""
        return f"weights: {self.weights}; dropout off"

    @property
    def result(self) -> str:
        """The loss, in one line, beside the one that the run logged."""
        return f"loss {self.loss:.6f}" + (f" ({self.logged})" if self.logged else "")


def logged_loss(metrics: Sequence[dict[str, Any]], step: int, config: RunConfig) -> str | None:
    """What metrics.jsonl says about a step's loss: that loss alone, or a mean over several steps."""
    steps = [record["step"] for record in metrics if "loss" in record]
    if step not in steps:
        return None
    first = max((other for other in steps if other < step), default=0) + 1
    loss = next(record["loss"] for record in metrics if record["step"] == step and "loss" in record)
    window = "" if first == step else f", the mean of steps {first} to {step}"
    noisy = config.lora.lora_dropout > 0 and not (config.method == "dpo" and config.dpo.disable_dropout)
    dropout = f", with dropout {config.lora.lora_dropout:g}" if noisy else ""
    return f"logged: {loss:.6f}{window}{dropout}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
