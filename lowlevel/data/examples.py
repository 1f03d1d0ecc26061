"""What methods train on: tokens of a conversation, a pair, or a prompt (made of rows in building.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowlevel.data.texts import Message


@dataclass(frozen=True)
class SFTExample:
    """A conversation of L tokens. Labels are not shifted; -100 for the first token and all that are not supervised."""

    row: int  # id of the row
    where: str  # place of the row
    input_ids: np.ndarray  # (L,) int32
    labels: np.ndarray  # (L,) int32
    values: tuple[float, ...] = ()  # numbers of the row in data.columns, for a custom loss
    weights: np.ndarray | None = None  # (L,) fp32, of each token in the loss, above 0 where learned; None: 1


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt with a chosen and a rejected completion, each (n,) int32; prompt + longer completion <= max_length.

    `row`, `where` and `values` as in SFTExample.
    """

    row: int
    where: str
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class PromptExample:
    """A prompt that an online method samples completions of; prompt + max_completion_length <= max_length."""

    row: int
    where: str
    prompt_ids: np.ndarray  # (n,) int32
    messages: Sequence[Message]
    reference: str | None  # text of the row's own reply, else its column "answer"
    columns: Mapping[str, object]  # of the row, for reward functions
    values: tuple[float, ...] = ()


Example = SFTExample | PreferenceExample | PromptExample
