"""Replies that end at a stop text, as tasks of the LM Evaluation Harness ask for: samplers only know stop tokens."""

from __future__ import annotations

from collections.abc import Sequence

from lowlevel.data.rendering import ChatTokenizer
from lowlevel.sampling import Sampler, Sampling


def reply_texts(
    sampler: Sampler,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[str],
    sampling: Sampling,
) -> list[str]:
    """Replies to prompts of token ids, each cut before its first stop text.

    A sampler shows the tokens of a reply as they are made, and is told to end it once a stop text is among them.
    """
    made: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # neighbours need little padding

    def has_stop(number: int, ids: Sequence[int]) -> bool:
        made[number] += ids
        text = _text(tokenizer, made[number])
        return any(stop in text for stop in stops if stop)

    found = sampler.sample([prompts[i] for i in order], sampling, watch=has_stop if any(stops) else None)
    texts = {i: cut(_text(tokenizer, one.ids[: len(one.ids) - one.ended].tolist()), stops)
             for i, (one,) in zip(order, found, strict=True)}  # fmt: skip
    return [texts[i] for i in range(len(prompts))]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before its first stop text."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def _text(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.tokenizer.decode(list(ids), skip_special_tokens=True))
