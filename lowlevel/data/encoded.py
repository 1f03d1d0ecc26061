"""Tokenised rows: a conversation, or a prompt with two completions, before labels and truncation."""

from __future__ import annotations

from dataclasses import dataclass

from lowlevel.data.templates import Span


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation.

    Attributes:
        input_ids: (L,) token ids.
        supervised: (L,) True where the assistant wrote the token, up to and including its end-of-turn token.
        replies: half-open token ranges of the assistant's replies.
        changed: replies that are context alone, since the template changes them in later turns.
        retokenised: boundaries of replies that fell inside a token, so that both sides were tokenised apart.
        left_out: messages that the template left out or changed.
        other_prompt: whether the tokens before the first reply are others than those that generation starts from, as
            where the end of a prompt and the first characters of a reply make one token.
    """

    input_ids: list[int]
    supervised: list[bool]
    replies: list[Span]
    changed: int
    retokenised: int
    left_out: int
    other_prompt: bool


@dataclass(frozen=True)
class EncodedPair:
    """A prompt, (P,) ids, and its two completions, (C,) and (R,); `retokenised` and `left_out` as above."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    retokenised: int
    left_out: int
