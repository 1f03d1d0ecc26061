"""Replies that end at a stop text, as tasks of the LM Evaluation Harness ask for: samplers only know stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowlevel.data.rendering import ChatTokenizer
from lowlevel.sampling import Sampler, Sampling

FIRST_ROUND = 64  # tokens


def reply_texts(
    sampler: Sampler,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[str],
    sampling: Sampling,
) -> list[str]:
    """Replies to prompts of token ids, each cut before its first stop text.

    Greedy replies are made in rounds of 64, 128, 256, ... tokens, and those with a stop text leave: no reply is
    generated to the end for a stop in its first line.
    """
    made: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # neighbours need little padding
    length = FIRST_ROUND if sampling.temperature == 0 and any(stops) else sampling.max_new_tokens
    while waiting:
        count = min(length, sampling.max_new_tokens - len(made[waiting[0]]))
        asked = [[*prompts[i], *made[i]] for i in waiting]
        going = []
        for i, (new,) in zip(waiting, sampler.sample(asked, replace(sampling, max_new_tokens=count)), strict=True):
            made[i] += new.ids[: len(new.ids) - new.ended].tolist()
            text = _text(tokenizer, made[i])
            if not new.ended and len(made[i]) < sampling.max_new_tokens and cut(text, stops) == text:
                going.append(i)
        waiting, length = going, 2 * length
    return [cut(_text(tokenizer, ids), stops) for ids in made]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before its first stop text."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def _text(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.tokenizer.decode(list(ids), skip_special_tokens=True))
