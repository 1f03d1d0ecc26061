"""Texts of greedy or sampled replies that end at a stop text, as tasks of the LM Evaluation Harness ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lowlevel.running.reopening import LoadedRun
from lowlevel.running.replies import Sampling, _generate

FIRST_ROUND = 32  # tokens
BATCH = 16  # prompts


def reply_texts(
    run: LoadedRun, prompts: Sequence[Sequence[int]], stops: Sequence[str], sampling: Sampling
) -> list[str]:
    """Replies to prompts of token ids, each cut before its first stop text.

    Generation knows only stop tokens, so greedy replies are made in rounds of 32, 64, 128, ... tokens, and what has a
    stop text leaves: no reply is generated to the end for a stop in its first line.
    """
    made: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    length = FIRST_ROUND if sampling.temperature == 0 and stops else sampling.max_new_tokens
    while waiting:
        count = min(length, sampling.max_new_tokens - len(made[waiting[0]]))
        going = []
        for i, ended, new in _round(run, prompts, made, waiting, count, sampling):
            made[i] += new
            if not (ended or len(made[i]) >= sampling.max_new_tokens or any(s in _text(run, made[i]) for s in stops)):
                going.append(i)
        waiting, length = going, 2 * length
    return [cut(_text(run, ids), stops) for ids in made]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before its first stop text."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def _round(
    run: LoadedRun,
    prompts: Sequence[Sequence[int]],
    made: Sequence[list[int]],
    waiting: Sequence[int],
    count: int,
    sampling: Sampling,
) -> Iterator[tuple[int, bool, list[int]]]:
    """Of each waiting reply: its index, whether it ended, and up to `count` new tokens without the stop token."""
    asked, stop_ids = replace(sampling, max_new_tokens=count), run.tokenizer.stop_ids
    for start in range(0, len(waiting), BATCH):
        part = waiting[start : start + BATCH]
        rows = [[*prompts[i], *made[i]] for i in part]
        new = _generate(run.policy.model, run.tokenizer, run.policy.placement, rows, asked)
        for i, ids in zip(part, new, strict=True):
            end = next((n for n, token in enumerate(ids) if token in stop_ids), None)
            yield i, end is not None, ids[:end]


def _text(run: LoadedRun, ids: Sequence[int]) -> str:
    return str(run.tokenizer.tokenizer.decode(ids, skip_special_tokens=True))
