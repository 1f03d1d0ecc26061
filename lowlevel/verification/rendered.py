"""The learned tokens of a row, derived from the row itself by the chat template and the tokenizer.

No code of `data.rendering` or `data.examples` is used: prefix and whole are rendered by `apply_chat_template` and
tokenised, and the tokens that the whole has more than the prefix are the assistant's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lowlevel.config.schema import DataConfig
from lowlevel.data.messages import Normalised, normalise
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
    config: DataConfig, method: str, tokenizer: ChatTokenizer, examples: tuple[Any, ...]
) -> dict[int, list[Expected]]:
    """By data row: one sequence of a conversation, chosen and rejected of a pair."""
    wanted = {example.row for example in examples}
    rows = [row for part in read_parts(config, method) for row in part.rows if row.id in wanted]
    found = {}
    for row in rows:
        normalised = normalise(row)
        messages: list[Any] = [dict(message) for message in normalised.messages]
        if normalised.completions:
            replies = [{"role": "assistant", "content": c} if isinstance(c, str) else c for c in normalised.completions]
            wholes = [[*messages, reply] for reply in replies]
            turns = [[len(messages)]] * 2
        else:
            wholes = [messages]
            turns = [[i for i, message in enumerate(messages) if message["role"] == "assistant"]]
        found[row.id] = [
            _expected(tokenizer, config, w, t, normalised, pair=len(wholes) > 1)
            for w, t in zip(wholes, turns, strict=True)
        ]
    return found


def _expected(
    tokenizer: ChatTokenizer, config: DataConfig, messages: list[Any], turns: list[int], row: Normalised, *, pair: bool
) -> Expected:
    own: Any = tokenizer.tokenizer

    def render(upto: int, prompt: bool) -> str:
        return own.apply_chat_template(
            messages[:upto],
            tools=list(row.tools) or None,
            chat_template=tokenizer.chat_template.text,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    text = render(len(messages), False)
    asked = [(render(turn, True), render(turn + 1, False)) for turn in turns]
    found = [(turn, len(a), _reply_end(tokenizer, b), b) for turn, (a, b) in zip(turns, asked, strict=True)]
    # a reply that the template changes in later turns is not learned
    spans = [(start, end, turn) for turn, start, end, answered in found if text.startswith(answered[:end])]
    if pair and config.supervise == "assistant":
        text = text[: spans[-1][1]]
    parts = [text, *(text[:cut] for span in spans for cut in span[:2])]
    tokens, *prefixes = own(parts, add_special_tokens=False, verbose=False)["input_ids"]
    sure = all(tokens[: len(prefix)] == prefix for prefix in prefixes)
    ids, shift = np.asarray(tokens, np.int64), 0
    cuts = [len(prefix) for prefix in prefixes]
    learned = np.zeros(len(ids), bool)
    if config.supervise == "all":
        learned[cuts[-2] if pair else 0 :] = True
    last = []
    for start, end, (_, _, turn) in zip(cuts[::2], cuts[1::2], spans, strict=True):
        learned[start:end] = turn not in row.context
        last += [] if turn in row.context else [end - 1]
    if tokenizer.bos_id is not None and (not len(ids) or ids[0] != tokenizer.bos_id):
        ids, learned, shift = np.concatenate([[tokenizer.bos_id], ids]), np.concatenate([[False], learned]), 1
    learned[:1] = False
    return Expected(ids, learned, tuple(end + shift for end in last) if sure else (), sure)


def _reply_end(tokenizer: ChatTokenizer, text: str) -> int:
    """End of the last end-of-turn token of a rendered conversation; blanks and eos after it belong to the template."""
    if tokenizer.end_of_turn_id is None:
        return len(text)
    token = str(tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.end_of_turn_id))
    place = text.rfind(token)
    after = text[place + len(token) :].replace(str(tokenizer.tokenizer.eos_token), "")
    return place + len(token) if place >= 0 and not after.strip() else len(text)


def truncated(
    example: Any, expected: list[Expected], paired: bool, rewards: bool = False
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Inputs (L-1,) and targets (L-1,) of each sequence as a batch must hold them, or None for a prompt that
    was cut from the left: there the cut decides. With `rewards` all L tokens, and the last one is its own target.
    """
    results = []
    for sequence, whole in zip(sequences_of(example, paired), expected, strict=True):
        if paired and int(whole.learned.argmax()) != len(example.prompt_ids):
            return None
        size = len(sequence.ids)
        ids, learned = whole.ids[:size], whole.learned[:size]
        if rewards:
            results.append((ids, np.where(np.arange(size) == size - 1, ids, IGNORED)))
            continue
        results.append((ids[:-1], np.where(learned, ids, IGNORED)[1:]))
    return results
