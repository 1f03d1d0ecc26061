"""Segments of a row: a prompt with any number of completions, or an SFT example, as positions (see layout.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowlevel.labels import IGNORED


@dataclass(frozen=True)
class Segment:
    """A prompt with completions, or an SFT example. Arrays are (n,) integers."""

    row: int  # data row, for dropout keys and error messages
    input_ids: np.ndarray
    position_ids: np.ndarray
    branch_ids: np.ndarray  # 0 in the prompt; a completion's positions are neighbours
    numbers: np.ndarray  # of each position's completion in the batch; those of pair n are 2 n and 2 n + 1
    targets: np.ndarray  # already shifted; IGNORED where nothing is learned
    weights: np.ndarray | None = None  # of the targets in the loss; None: 1

    def __len__(self) -> int:
        """Positions in the row."""
        return len(self.input_ids)


@dataclass(frozen=True)
class Branch:
    """A completion of a segment, as inputs and targets of the same positions. Arrays are (n,)."""

    number: int  # of the completion in the batch
    branch: int  # 1 or more; 0 only for the single branch of a segment without a prompt
    input_ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None


def build_segment(row: int, prompt: np.ndarray, branches: Sequence[Branch]) -> Segment:
    """Positions of the shared `prompt` (p,), which may be empty, followed by those of each branch."""
    p, sizes = len(prompt), [len(branch.input_ids) for branch in branches]
    weights = [np.ones(size) if b.weights is None else b.weights for b, size in zip(branches, sizes, strict=True)]
    return Segment(
        row,
        input_ids=np.concatenate([prompt, *(branch.input_ids for branch in branches)]),
        position_ids=np.concatenate([np.arange(p), *(np.arange(p, p + size) for size in sizes)]),
        branch_ids=np.repeat([0, *(branch.branch for branch in branches)], [p, *sizes]),
        numbers=np.repeat([branches[0].number, *(branch.number for branch in branches)], [p, *sizes]),
        targets=np.concatenate([np.full(p, IGNORED), *(branch.targets for branch in branches)]),
        weights=None if all(b.weights is None for b in branches) else np.concatenate([np.ones(p), *weights]),
    )


def sft_segment(
    row: int, number: int, input_ids: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> Segment:
    """An example of L tokens as L-1 positions: position t predicts token t+1."""
    shifted = None if weights is None else weights[1:]
    return build_segment(row, input_ids[:0], [Branch(number, 0, input_ids[:-1], labels[1:], shifted)])


def prompt_segment(row: int, number: int, prompt: np.ndarray, completions: Mapping[int, np.ndarray]) -> Segment:
    """A prompt and its completions by branch, numbered from `number`.

    len(prompt) - 1 + the sum of len(completion) positions: each completion starts with the prompt's last token, which
    predicts its first one.
    """
    inputs = {branch: np.concatenate([prompt[-1:], ids[:-1]]) for branch, ids in completions.items()}
    numbered = enumerate(completions.items(), number)
    return build_segment(row, prompt[:-1], [Branch(n, branch, inputs[branch], ids) for n, (branch, ids) in numbered])


def pair_segments(
    pair: Any, number: int, *, shared: bool, segment: Callable[..., Segment] = prompt_segment
) -> list[Segment]:
    """A preference pair as one segment with a shared prompt, or as two plain sequences."""
    branches = {1: pair.chosen_ids, 2: pair.rejected_ids}
    parts = [branches] if shared else [{branch: ids} for branch, ids in branches.items()]
    return [segment(pair.row, 2 * number + i, pair.prompt_ids, part) for i, part in enumerate(parts)]
