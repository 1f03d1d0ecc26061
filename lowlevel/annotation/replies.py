"""Prompts from a file, and two sampled replies to each."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lowlevel.annotation.pairs import Message, Pair
from lowlevel.data import readers
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.rows import Row
from lowlevel.data.templates import RenderError
from lowlevel.data.texts import BadRow, is_blank, is_filled
from lowlevel.data.turns import turns_of
from lowlevel.errors import DataError
from lowlevel.evaluation.rows import read_rows
from lowlevel.model.adapters import adapter_sha256
from lowlevel.running.reopening import Note, check_gives_text
from lowlevel.running.replies import Reply, Sampling, generate_replies, load_for_replies
from lowlevel.running.run_folder import RunFolder

Prompt = tuple[str, list[Message]]  # the row's place in its file, and the messages before a reply


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of a file: "prompt", a text or messages, or "messages" without their last reply.

    Raises ConfigError for an unknown source; DataError for unusable rows.
    """
    return read_rows(source, lambda row: (row.where, _messages(row)), "heldout", "dpo")


def _messages(row: Row) -> list[Message]:
    columns = row.columns
    if is_filled(columns.get("tools")):
        raise BadRow("tools", '"tools" cannot be shown: leave them out')
    if columns.get("prompt") is not None:
        messages = readers.prompts(columns)[0].messages
    elif columns.get("messages") is not None:
        messages = turns_of(columns, "messages").messages
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    else:
        raise BadRow("missing column", f'needs "prompt" or "messages"; found: {", ".join(columns)}')
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise BadRow("no question", "the prompt does not end with a message of the user")
    return messages


def describe_runs(runs: Sequence[Path]) -> list[dict[str, str]]:
    """Folder and adapter hash of finished runs. Raises ConfigError for other folders, before a model is loaded."""
    described = []
    for run in runs:
        folder = RunFolder(run)
        check_gives_text(folder.read_config(), run)
        described.append({"run": str(run), "adapter_sha256": adapter_sha256(folder.final_adapter())})
    return described


def sample_pairs(
    runs: Sequence[Path], prompts: Sequence[Prompt], sampling: Sampling, note: Note
) -> tuple[list[Pair], Counter[str]]:
    """Two replies to each prompt; pairs that nobody can judge or learn from are counted by reason and left out.

    The second of two runs has another seed: with the noise of the first, like policies would give equal replies.
    Raises DataError for prompts that a chat template cannot render.
    """
    replies: list[list[Reply]] = [[] for _ in prompts]
    for number, run in enumerate(runs):
        sampler, tokenizer = load_for_replies(run, note)
        ids = [_encoded(tokenizer, *prompt) for prompt in prompts]
        own = replace(sampling, seed=sampling.seed + number)
        for i, reply in enumerate(generate_replies(sampler, tokenizer, ids, own, samples=2 // len(runs))):
            replies[i * len(runs) // 2].append(reply)
        del sampler
        gc.collect()  # the model is in reference cycles, and the next one needs its memory
    pairs, left_out = [], Counter[str]()
    for (where, messages), (first, second) in zip(prompts, replies, strict=True):
        if is_blank(first.text) or is_blank(second.text):
            left_out["an empty reply"] += 1
        elif first.text.strip() == second.text.strip():
            left_out["two equal replies"] += 1
        else:
            ended = (first.ended, second.ended)
            pairs.append(Pair(where, messages, (first.text, second.text), ended))
    return pairs, left_out


def _encoded(tokenizer: ChatTokenizer, where: str, messages: list[Message]) -> list[int]:
    try:
        return tokenizer.encode_prompt(messages)
    except RenderError as error:
        raise DataError(f"{where}: {error}") from None
