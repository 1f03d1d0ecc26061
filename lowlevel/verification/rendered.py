"""The learned tokens of a row, derived from the row itself by the chat template and offsets of transformers.

No code of `data.rendering` or `data.examples` is used: prefix and whole are rendered by `apply_chat_template`, and a
token is the assistant's if it begins in the text between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lowlevel.config.schema import DataConfig
from lowlevel.data.messages import normalise
from lowlevel.data.mixing import read_parts
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.labels import IGNORED
from lowlevel.verification.truth import sequences_of


@dataclass(frozen=True)
class Expected:
    """A whole sequence before truncation: ids (L,), and which tokens are learned (L,).

    `sure` is False if a token crosses the boundary of prompt and reply: such rows are tokenised in parts.
    """

    ids: np.ndarray
    learned: np.ndarray
    ends: tuple[int, ...]  # index of the last learned token of each reply
    sure: bool


def expected_sequences(
    config: DataConfig, tokenizer: ChatTokenizer, examples: tuple[Any, ...]
) -> dict[int, list[Expected]]:
    """By data row: one sequence of a conversation, chosen and rejected of a pair."""
    wanted = {example.row for example in examples}
    rows = [row for part in read_parts(config) for row in part.rows if row.id in wanted]
    found = {}
    for row in rows:
        normalised = normalise(row, row.format or config.format)
        messages: list[Any] = [dict(message) for message in normalised.messages]
        if normalised.completions:
            wholes = [[*messages, {"role": "assistant", "content": text}] for text in normalised.completions]
            turns = [[len(messages)]] * 2
        else:
            wholes = [messages]
            turns = [[i for i, message in enumerate(messages) if message["role"] == "assistant"]]
        found[row.id] = [
            _expected(tokenizer, config, w, t, pair=len(wholes) > 1) for w, t in zip(wholes, turns, strict=True)
        ]
    return found


def _expected(
    tokenizer: ChatTokenizer, config: DataConfig, messages: list[Any], turns: list[int], *, pair: bool
) -> Expected:
    own: Any = tokenizer.tokenizer

    def render(upto: int, prompt: bool) -> str:
        return own.apply_chat_template(
            messages[:upto], chat_template=tokenizer.chat_template.text, tokenize=False, add_generation_prompt=prompt
        )

    text = render(len(messages), False)
    asked = [(render(turn, True), render(turn + 1, False)) for turn in turns]
    found = [(len(prompt), _reply_end(tokenizer, answered), answered) for prompt, answered in asked]
    # a reply that the template changes in later turns is not learned
    spans = [(start, end) for start, end, answered in found if text.startswith(answered[:end])]
    if pair and config.supervise == "assistant":
        text = text[: spans[-1][1]]
    encoded = own(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    ids = np.asarray(encoded["input_ids"], np.int64)
    replies = [(starts >= start) & (starts < end) for start, end in spans]
    learned = np.logical_or.reduce(replies)
    if config.supervise == "all":
        learned = starts >= spans[-1][0] if pair else np.ones(len(ids), bool)
    sure = not any(bool(np.any((starts < cut) & (cut < ends))) for span in spans for cut in span)
    shift = 0
    if tokenizer.bos_id is not None and (not len(ids) or ids[0] != tokenizer.bos_id):
        ids, learned, shift = np.concatenate([[tokenizer.bos_id], ids]), np.concatenate([[False], learned]), 1
    learned[:1] = False
    return Expected(
        ids, learned, tuple(int(np.flatnonzero(reply)[-1]) + shift for reply in replies if reply.any()), sure
    )


def _reply_end(tokenizer: ChatTokenizer, text: str) -> int:
    """End of the last end-of-turn token of a rendered conversation; blanks and eos after it belong to the template."""
    if tokenizer.end_of_turn_id is None:
        return len(text)
    token = str(tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.end_of_turn_id))
    place = text.rfind(token)
    after = text[place + len(token) :].replace(str(tokenizer.tokenizer.eos_token), "")
    return place + len(token) if place >= 0 and not after.strip() else len(text)


def truncated(example: Any, expected: list[Expected], preference: bool) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Inputs (L-1,) and targets (L-1,) of each sequence as a batch must hold them, or None for a prompt that
    was cut from the left: there the cut decides.
    """
    results = []
    for sequence, whole in zip(sequences_of(example, preference), expected, strict=True):
        if preference and int(whole.learned.argmax()) != len(example.prompt_ids):
            return None
        size = len(sequence.ids)
        ids, learned = whole.ids[:size], whole.learned[:size]
        results.append((ids[:-1], np.where(learned, ids, IGNORED)[1:]))
    return results
