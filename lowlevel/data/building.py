"""From messages to training examples: token ids, labels, truncation. A row without an example gets a reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowlevel.config.data import DataConfig
from lowlevel.data.examples import PreferenceExample, PromptExample, SFTExample
from lowlevel.data.messages import Normalised
from lowlevel.data.rendering import CHANGED, CROSSED, ChatTokenizer, Encoded, EncodedPair
from lowlevel.data.rows import RowProblem
from lowlevel.data.templates import RenderError
from lowlevel.data.texts import BadRow, is_blank, number_as_text
from lowlevel.data.truncation import Sizes, sizes_of
from lowlevel.errors import DataError, how_many
from lowlevel.heartbeat import counted
from lowlevel.labels import IGNORED

TOO_LONG = "longer than max_length"
EQUAL_WHEN_CUT = "chosen = rejected after truncation"
BATCH = 256
Ids = list[int]


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a row that gives an example: before truncation, and lost by it."""

    total: int
    kept: int  # after truncation
    prompt: int
    supervised: int
    chosen: int = 0  # of a pair, as `rejected`
    rejected: int = 0
    lost: int = 0  # supervised (or completion) tokens lost by truncation
    prompt_lost: int = 0
    replies: int = 0  # in the example
    ended: int = 0  # replies with their end-of-turn token


@dataclass(frozen=True)
class Built:
    """Examples with their rows and token counts (three parallel lists); problems of the other rows; all warnings."""

    examples: list[SFTExample] | list[PreferenceExample] | list[PromptExample]
    rows: list[Normalised]
    counts: list[TokenCounts]
    problems: list[RowProblem]
    warnings: Counter[str]
    sizes: list[Sizes] = field(default_factory=list)  # of the examples, and of rows that truncation made unusable

    @property
    def unusable(self) -> list[RowProblem]:
        """The problems that data.on_bad_row decides on: all but rows that are too long."""
        return [problem for problem in self.problems if problem.reason != TOO_LONG]


def build_examples(
    rows: Sequence[Normalised], data: DataConfig, tokenizer: ChatTokenizer, vocab_size: int, room: int | None = None
) -> Built:
    """Tokenise, label and truncate rows of one method, in the given order; `room`: of prompts, for each completion.

    Raises DataError for a token id >= `vocab_size`, the rows of the model's embedding.
    """
    if room is not None:
        return _prompts(rows, data, tokenizer, vocab_size, room)
    pairs = any(row.completions for row in rows)
    make: Callable[..., tuple[Any, TokenCounts]] = preference_example if pairs else sft_example
    built = Built([], [], [], [], Counter())
    ends = [tokenizer.decode([i]) for i in tokenizer.stop_ids]
    for row, encoded in zip(counted("tokenising", rows, "rows"), _encode(rows, data, tokenizer), strict=True):
        try:
            if isinstance(encoded, RenderError):
                raise BadRow("chat template", str(encoded))
            _check_vocabulary(row, encoded, vocab_size)
            _check_replies(row, ends)
            example, count = make(row, encoded, data, tokenizer)
        except BadRow as bad:
            built.problems.append(RowProblem(row.row.where, bad.reason, str(bad)))
            if bad.reason in (TOO_LONG, EQUAL_WHEN_CUT) and not isinstance(encoded, RenderError):
                built.sizes.append(sizes_of(encoded, data))
            continue
        built.sizes.append(sizes_of(encoded, data))
        built.examples.append(example)
        built.rows.append(row)
        built.counts.append(count)
        built.warnings.update(encoded.warnings)
    if data.supervise == "all":  # these replies are learned, too
        del built.warnings[CHANGED], built.warnings[CROSSED]
    built.problems.sort(key=lambda problem: problem.reason == TOO_LONG)  # these last
    return built


def _prompts(
    rows: Sequence[Normalised], data: DataConfig, tokenizer: ChatTokenizer, vocab_size: int, room: int
) -> Built:
    """Tokenise prompts; a row's own last reply, if it has one, becomes the reference."""
    built, limit = Built([], [], [], [], Counter()), data.max_length - room
    for row in counted("tokenising", rows, "rows"):
        said, last = row.messages, row.messages[-1]
        has_reply = last["role"] == "assistant"
        answer = number_as_text(row.row.columns.get("answer"))
        messages, reference = (said[:-1], str(last["content"])) if has_reply else (said, answer)
        try:
            ids = tokenizer.encode_prompt(messages, row.tools)
        except RenderError as error:
            built.problems.append(RowProblem(row.row.where, "chat template", str(error)))
            continue
        _check_vocabulary(row, ids, vocab_size)
        if len(ids) > limit:
            much = f"prompt has {len(ids)} tokens; max_length {data.max_length} leaves {limit} beside {room} new ones"
            built.problems.append(RowProblem(row.row.where, TOO_LONG, much))
            continue
        array, reference = np.asarray(ids, np.int32), reference if isinstance(reference, str) else None
        built.examples.append(PromptExample(row.row.id, row.row.where, array, messages, reference, row.row.columns))  # type: ignore[arg-type]
        built.rows.append(row)
        built.counts.append(TokenCounts(len(ids), len(ids), len(ids), 0))
    return built


def _check_replies(row: Normalised, ends: Sequence[str]) -> None:
    """Raise BadRow for a reply of which nothing is left without the tokens that end a reply."""
    for text in row.replies:
        rest = text
        for end in ends:
            rest = rest.replace(end, "")
        if rest != text and is_blank(rest):
            raise BadRow("empty completion", f"a reply is nothing but {json.dumps(text.strip())}, the end of a reply")


def sft_example(
    row: Normalised, encoded: Encoded, data: DataConfig, tokenizer: ChatTokenizer
) -> tuple[SFTExample, TokenCounts]:
    """Label a conversation and keep its first max_length tokens. Raises BadRow if no supervised token is left."""
    ids = np.asarray(encoded.input_ids, np.int32)
    learned = np.full(len(ids), data.supervise == "all")
    for start, end in encoded.replies:
        learned[start:end] = True
    for start, end in encoded.context:
        learned[start:end] = False
    if data.supervise == "all":
        _check_marked(row, encoded)
    learned[:1] = False
    limit = data.max_length
    if not learned.any():
        also = ", but those that the data masks" if encoded.context else ""
        raise BadRow("no assistant turn", f"nothing to learn from (the chat template marks no reply{also})")
    prompt = int(learned.argmax()) if data.supervise == "assistant" else encoded.replies[0][0] if encoded.replies else 0
    if not learned[:limit].any():
        raise BadRow(TOO_LONG, f"prompt has {prompt} tokens, max_length {limit} leaves no completion token")
    replies = [(start, end) for start, end in encoded.replies if start < limit]
    counts = TokenCounts(
        total=len(ids),
        kept=min(len(ids), limit),
        prompt=prompt,
        supervised=int(learned.sum()),
        lost=int(learned[limit:].sum()),
        replies=len(replies),
        ended=sum(end <= limit and ids[end - 1] == tokenizer.end_of_turn_id for _, end in replies),
    )
    ids, learned, weights = ids[:limit], learned[:limit], _weights(row, encoded, len(ids))
    labels = np.where(learned, ids, IGNORED).astype(np.int32)
    weights = None if weights is None else weights[:limit]
    return SFTExample(row.row.id, row.row.where, ids, labels, row.values, weights), counts


def _check_marked(row: Normalised, encoded: Encoded) -> None:
    """Refuse a mark on a reply whose tokens are not known, although all tokens are learned."""
    reason = 'but the chat template changes it in later turns: set data.supervise = "assistant"'
    if len(encoded.context) < len(row.context):
        raise BadRow("not to be learned", f"a reply is marked as not to be learned, {reason}")
    if not row.reply_weights.keys() <= {*encoded.turns}:
        raise BadRow("unclear weight", f"a reply has a weight, {reason}")


def _weights(row: Normalised, encoded: Encoded, size: int) -> np.ndarray | None:
    """The weight of each token, (size,) fp32: that of the row times that of the reply; None if all are 1."""
    if row.weight == 1 and not row.reply_weights:
        return None
    weights = np.full(size, row.weight)
    for (start, end), turn in zip(encoded.replies, encoded.turns, strict=True):
        weights[start:end] *= row.reply_weights.get(turn, 1.0)
    return weights.astype(np.float32)


def preference_example(
    row: Normalised, pair: EncodedPair, data: DataConfig, tokenizer: ChatTokenizer
) -> tuple[PreferenceExample, TokenCounts]:
    """Truncate a pair to max_length tokens per sequence. Raises BadRow if both completions have the same tokens."""
    prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
    if chosen == rejected:
        raise BadRow("chosen = rejected", f"chosen and rejected have the same tokens ({len(chosen)})")
    kept = truncate_pair(prompt, chosen, rejected, data.max_length, data.max_prompt_length, tokenizer.bos_id)
    if kept[1] == kept[2]:
        cut = f"truncation to max_length {data.max_length} ({how_many(len(kept[1]), 'tokens')} left)"
        raise BadRow(EQUAL_WHEN_CUT, f"chosen and rejected are the same after {cut}")
    tail = 1 + len(tokenizer.chat_template.after_turn)  # tokens at the end, with the end-of-turn token among them
    counts = TokenCounts(
        total=len(prompt) + len(chosen) + len(rejected),
        kept=sum(map(len, kept)),
        prompt=len(prompt),
        supervised=len(chosen) + len(rejected),
        chosen=len(chosen),
        rejected=len(rejected),
        lost=len(chosen) + len(rejected) - len(kept[1]) - len(kept[2]),
        prompt_lost=len(prompt) - len(kept[0]),
        replies=2,
        ended=sum(tokenizer.end_of_turn_id in completion[-tail:] for completion in kept[1:]),
    )
    prompt_ids, chosen_ids, rejected_ids = (np.asarray(ids, np.int32) for ids in kept)
    return PreferenceExample(row.row.id, row.row.where, prompt_ids, chosen_ids, rejected_ids, row.values), counts


def truncate_pair(
    prompt: Ids, chosen: Ids, rejected: Ids, max_length: int, max_prompt: int | None, bos_id: int | None
) -> tuple[Ids, Ids, Ids]:
    """Cut a pair so that the prompt with either completion has at most max_length tokens.

    The prompt is cut from the left to max_prompt, and to the room that the longer completion leaves; a completion can
    claim at most half of max_length. Completions are then cut from the right.
    """
    claimed = min(max(len(chosen), len(rejected)), max_length // 2)
    budget = min(max_length - claimed, max_prompt or max_length)
    if len(prompt) > budget:
        keep_bos = bos_id is not None and prompt[0] == bos_id
        prompt = [prompt[0], *prompt[len(prompt) - budget + 1 :]] if keep_bos else prompt[-budget:]
    room = max_length - len(prompt)
    return prompt, chosen[:room], rejected[:room]


def _encode(
    rows: Sequence[Normalised], data: DataConfig, tokenizer: ChatTokenizer
) -> Iterator[Encoded | EncodedPair | RenderError]:
    """Tokenise in batches: a call on one row costs mostly Python overhead."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        tools = [row.tools for row in batch]
        pairs = [(row.messages, *row.completions) for row in batch if row.completions]
        if pairs:
            yield from tokenizer.encode_pairs(pairs, data.supervise, tools)
        else:
            conversations = [row.messages for row in batch]
            yield from tokenizer.encode_conversations(conversations, tools, [row.context for row in batch])


def _check_vocabulary(row: Normalised, encoded: Encoded | EncodedPair | Ids, vocab_size: int) -> None:
    if isinstance(encoded, list):
        largest = max(encoded, default=0)
    elif isinstance(encoded, Encoded):
        largest = max(encoded.input_ids, default=0)
    else:
        largest = max(encoded.prompt_ids + encoded.chosen_ids + encoded.rejected_ids, default=0)
    if largest >= vocab_size:
        hint = "the tokenizer does not belong to this model"
        raise DataError(f"{row.row.where}: token id {largest} >= vocabulary {vocab_size} (row {row.row.id}); {hint}")
