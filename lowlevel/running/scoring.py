"""Rewards of completions and pairs from a reward run; also the best of several replies.

Prompt and completion become tokens by the functions of training, so a completion has the same reward alone, in a pair
and in a training step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowlevel.batch.layout import build_batch
from lowlevel.config.data import DataConfig
from lowlevel.config.given import GivenRows
from lowlevel.data.building import truncate_pair
from lowlevel.data.formats import recognised
from lowlevel.data.messages import Normalised
from lowlevel.data.prepare import normalised_rows
from lowlevel.data.rows import RowProblem, data_error
from lowlevel.data.sources import read_source
from lowlevel.data.templates import RenderError
from lowlevel.errors import how_many
from lowlevel.losses.reward import calibration, ranked
from lowlevel.methods.reward import read_segment
from lowlevel.running.reopening import LoadedRun, Note, reopen
from lowlevel.running.run_folder import check_reward_run

BATCH = 16  # sequences


@dataclass(frozen=True)
class RowRewards:
    """The rewards of a row: of its completion, or of a pair chosen and rejected."""

    row: int
    where: str
    rewards: tuple[float, ...]
    cut: bool  # a sequence was longer than data.max_length: the reward is of its first tokens

    def as_json(self) -> dict[str, Any]:
        """A line of scores.jsonl."""
        names = ("reward",) if len(self.rewards) == 1 else ("chosen_reward", "rejected_reward")
        line: dict[str, Any] = {"row": self.row, "where": self.where, **dict(zip(names, self.rewards, strict=True))}
        return line | ({"margin": self.rewards[0] - self.rewards[1]} if len(self.rewards) == 2 else {})


def load_reward_run(run_dir: Path, note: Note) -> LoadedRun:
    """A reward run with its newest weights. Raises ConfigError for another method, or without saved weights."""
    check_reward_run(run_dir)
    opened = reopen(run_dir, note)
    return opened.load(opened.folder.newest_adapter(note) or opened.folder.final_adapter())


def score_source(run: LoadedRun, source: str | GivenRows, split: str = "test") -> list[RowRewards]:
    """Score every row: pairs as in training, or "prompt" + "completion" and "messages", whose last reply is scored.

    Raises ConfigError for an unknown source; DataError for unusable rows.
    """
    read = read_source(source, "heldout" if source == "demo" else split, "reward")
    columns = {column for row in read.rows for column in row.columns}
    pairs = {"chosen", "rejected"} <= columns
    method = "reward" if pairs else "kto" if "label" in columns else "sft"
    read = recognised(read, run.config.data.format if pairs else "auto", method)
    found = list(normalised_rows(read.rows, DataConfig()))
    rows = [row for row in found if isinstance(row, Normalised)]
    problems = [row for row in found if isinstance(row, RowProblem)]
    sequences = _sequences(run, rows, problems)
    if problems or read.problems:
        raise data_error([*read.problems, *problems])
    rewards = iter(rewards_of(run, [ids for _, parts in sequences for ids in parts]))
    return [
        RowRewards(row.row.id, row.row.where, tuple(next(rewards) for _ in parts), cut)
        for row, (cut, parts) in zip(rows, sequences, strict=True)
    ]


Ids = tuple[list[int], list[int]]  # prompt, completion


def _sequences(run: LoadedRun, rows: Sequence[Normalised], problems: list[RowProblem]) -> list[tuple[bool, list[Ids]]]:
    """For each row, whether it was cut and its one or two sequences; a completion is a pair of itself."""
    data, tokenizer, found = run.config.data, run.tokenizer, []
    pairs = []
    for row in rows:
        prompt = row.messages if row.completions else row.messages[:-1]
        pairs.append((prompt, *(row.completions or (row.messages[-1],) * 2)))
    for row, pair in zip(rows, tokenizer.encode_pairs(pairs, data.supervise, [row.tools for row in rows]), strict=True):
        if isinstance(pair, RenderError):
            problems.append(RowProblem(row.row.where, "chat template", str(pair)))
            continue
        whole = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        kept = truncate_pair(*whole, data.max_length, data.max_prompt_length, tokenizer.bos_id)
        parts = [(kept[0], ids) for ids in kept[1:]]
        found.append((kept != whole, parts if row.completions else parts[:1]))
    return found


@torch.no_grad()
def rewards_of(run: LoadedRun, sequences: Sequence[Ids]) -> list[float]:
    """The reward of each prompt with its completion, in the given order; every completion has at least one token."""
    found: list[float] = []
    run.policy.dropout.disable()
    for start in range(0, len(sequences), BATCH):
        part = enumerate(sequences[start : start + BATCH])
        rows = [[read_segment(i, i, np.asarray(prompt, int), {1: np.asarray(ids, int)})] for i, (prompt, ids) in part]
        batch = build_batch(rows, pairs=False).to(run.policy.placement.device)
        found += run.policy.rewards(batch).tolist()
    return found


def summary(scored: Sequence[RowRewards]) -> str:
    """Accuracy and calibration of pairs, and the mean reward of single completions, in one line each."""
    lines, pairs = [], [one.rewards for one in scored if len(one.rewards) == 2]
    if pairs:
        chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
        margins = chosen - rejected
        measured = {"accuracy": float(ranked(margins).mean()), "mean margin": float(margins.mean())}
        measured |= {name.replace("_", " "): value for name, value in calibration(margins).items()}
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        lines.append(f"{how_many(len(pairs), 'pairs')}: {numbers}")
    single = [one.rewards[0] for one in scored if len(one.rewards) == 1]
    if single:
        mean = sum(single) / len(single)
        count = how_many(len(single), "completions")
        lines.append(f"{count}: mean reward {mean:+.4f}, {min(single):+.4f} to {max(single):+.4f}")
    if cut := sum(one.cut for one in scored):
        lines.append(f"warning: {how_many(cut, 'rows')} cut to data.max_length: the reward is that of the first tokens")
    return "\n".join(lines)


def rewards_of_replies(run: LoadedRun, messages: Sequence[dict[str, Any]], replies: Sequence[str]) -> list[float]:
    """The rewards of replies to one prompt; NaN for an empty one, which has none."""
    rows = [{"messages": [*messages, {"role": "assistant", "content": text}]} for text in replies if text.strip()]
    found = iter(score_source(run, GivenRows.of(rows)) if rows else ())
    return [next(found).rewards[0] if text.strip() else math.nan for text in replies]


def best_of(run: LoadedRun, messages: list[dict[str, str]], replies: Sequence[str]) -> list[tuple[float, str]]:
    """Replies to one prompt with their rewards, the best first; empty ones have no reward and are left out."""
    rewards = rewards_of_replies(run, messages, replies)
    return sorted(
        ((reward, text) for reward, text in zip(rewards, replies, strict=True) if math.isfinite(reward)), reverse=True
    )
