"""A reward model on preference pairs; head and loss are in losses/reward.py. There is no reference and no LM head.

A completion is read at its last token, which the layout marks by the lengths of the sequences: no token id, of padding
or of an end of turn, has a special meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.packing import ExampleLayout
from lowlevel.batch.segments import Branch, Segment, build_segment, pair_segments
from lowlevel.config.offline import RewardConfig
from lowlevel.data.examples import PreferenceExample
from lowlevel.labels import IGNORED
from lowlevel.losses import LossSums
from lowlevel.losses.modifiers import MARGIN_COLUMNS
from lowlevel.losses.registry import LossSpec
from lowlevel.losses.reward import REWARD_LOSSES, PairRewards, calibration, ranked
from lowlevel.model.policy import Policy


@dataclass(frozen=True)
class Reward(ExampleLayout):
    """The reward model's method. With packing, the prompt of a pair is computed once."""

    config: RewardConfig
    name: ClassVar[str] = "reward"
    unit: ClassVar[str] = "pairs"
    paired: ClassVar[bool] = True
    has_reference: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """The Bradley-Terry loss, summed over the batch's pairs."""
        if self.config.disable_dropout:
            policy.dropout.disable()
        pairs = self.pair_rewards(batch, policy.rewards(batch))  # w . h at each last token
        losses = self.losses(pairs)  # -logsigmoid(pairs.margins - m) + c (r+ + r-)^2
        chosen, rejected, margins = (value.detach() for value in (pairs.chosen, pairs.rejected, pairs.margins))
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins,
            "rewards/accuracies": ranked(margins),
        }
        examples = {"chosen_reward": chosen, "rejected_reward": rejected, "margin": margins}
        return LossSums.over(batch.real, losses, metrics, examples, {})

    @property
    def spec(self) -> LossSpec:
        """The Bradley-Terry loss; there is no other."""
        return REWARD_LOSSES["bradley_terry"]

    @cached_property
    def settings(self) -> Mapping[str, float]:
        """The loss's hyper-parameters."""
        return {name: getattr(self.config, name) for name in self.spec.parameters}

    def pair_rewards(self, batch: PackedBatch, rewards: Tensor) -> PairRewards:
        """The input of the loss, from the reward of each sequence (S,): all chosen, then all rejected."""
        chosen, rejected = rewards.chunk(2)
        return PairRewards(chosen, rejected, values=batch.values(self.columns))

    def losses(self, pairs: PairRewards) -> Tensor:
        """The loss of each pair, (P,)."""
        return self.spec(pairs, self.settings)[0]

    def held_out_scores(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """How far the margins can be trusted as probabilities."""
        return calibration(seen["margin"])

    def size(self, example: PreferenceExample) -> int:
        """Positions of a pair with its prompt shared."""
        return len(example.prompt_ids) + len(example.chosen_ids) + len(example.rejected_ids)

    def segments(self, example: PreferenceExample, number: int) -> list[Segment]:
        """With packing one with a shared prompt, else two plain sequences."""
        return pair_segments(example, number, shared=self.packing, segment=read_segment)


def read_segment(row: int, number: int, prompt: np.ndarray, completions: dict[int, np.ndarray]) -> Segment:
    """A prompt with completions by branch, numbered from `number`, that are read at their last token, for a reward.

    Every token is an input, and the last one of a completion has its own id as target, which marks it as scored.
    """
    branches = [
        Branch(n, branch, ids, np.where(np.arange(len(ids)) == len(ids) - 1, ids, IGNORED))
        for n, (branch, ids) in enumerate(completions.items(), number)
    ]
    return build_segment(row, prompt, branches)


def check_columns(columns: Sequence[str]) -> None:
    """Raise ValueError for columns that are not those of a rated margin."""
    if columns and set(columns) not in map(set, MARGIN_COLUMNS):
        known = " or ".join(str(list(names)).replace("'", '"') for names in MARGIN_COLUMNS)
        raise ValueError(f"data.columns {list(columns)} is not read: a rated margin is {known}".replace("'", '"'))
