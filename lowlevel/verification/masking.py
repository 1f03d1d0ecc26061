"""Group 5, masking: the learned tokens, as the batches hold them, against the rows rendered again.

This uses no code of `data.rendering` or `data.examples`: prefix and whole are rendered by `apply_chat_template` and
tokenised, and the tokens that the whole has more than the prefix are the assistant's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PADDING, PackedBatch
from lowlevel.config.data import DataConfig
from lowlevel.data.messages import Normalised, normalise
from lowlevel.data.mixing import read_parts
from lowlevel.data.rendering import ChatTokenizer
from lowlevel.labels import IGNORED
from lowlevel.verification.exact import sequences_of
from lowlevel.verification.subject import Check, Subject, check


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


GROUP = "masking"


@dataclass(frozen=True)
class Read:
    """One scored sequence as a micro-batch holds it."""

    row: int  # of the data
    side: int  # 0 sft or chosen, 1 rejected
    columns: np.ndarray  # (L,) places, in the flattened rows, of the tokens that its last token attends to, in order
    inputs: np.ndarray  # (L,) tokens there
    targets: np.ndarray  # (L,) targets there, IGNORED if not scored


def masking_checks(subject: Subject) -> list[Check]:
    """Dropout must be off."""
    expected = expected_sequences(subject.config.data, subject.method.name, subject.tokenizer, subject.examples)
    batches = subject.batches()
    reads = [read_sequences(batch) for batch in batches]
    flat = [read for of_batch in reads for read in of_batch]
    by_row = {example.row: example for example in subject.examples}
    kind = subject.method.paired, subject.rewards
    targets = {
        row: truncated(by_row[row], wholes, *kind) if all(w.sure for w in wholes) else None
        for row, wholes in expected.items()
    }
    of_targets = _targets(flat, targets, len(subject.examples) * (1 + subject.method.paired))
    checks = [_supervised(batches, flat), *of_targets[: 1 if subject.rewards else 2]]
    checks += [_ends(subject, flat, expected, by_row), _bos(subject, flat)]
    return [*checks, _gradient(subject, batches, reads, targets)]


def read_sequences(batch: PackedBatch) -> list[Read]:
    """Every sequence of the batch's sums, read through their index."""
    width, examples = batch.input_ids.shape[1], len(batch.real)
    ids, segments, branches = (
        t.flatten().cpu().numpy() for t in (batch.input_ids, batch.segment_ids, batch.branch_ids)
    )
    scored, wanted = batch.scored_positions.cpu().numpy(), batch.scored_targets.cpu().numpy()
    found = []
    for sequence, index in enumerate(batch.sequence_index.cpu().numpy()):
        taken = index[index < len(scored)]
        if not len(taken) or sequence % examples >= len(batch.data_rows):
            continue
        places = scored[taken]
        last = places.max()
        row = slice(last // width * width, last + 1)
        seen = (segments[row] == segments[last]) & ((branches[row] == 0) | (branches[row] == branches[last]))
        columns = np.flatnonzero(seen) + row.start
        targets = np.full(len(columns), IGNORED)
        inside = np.isin(places, columns)
        targets[np.searchsorted(columns, places[inside])] = wanted[taken][inside]
        side = int(sequence >= examples)
        found.append(Read(batch.data_rows[sequence % examples], side, columns, ids[columns], targets))
    return found


Targets = dict[int, list[tuple[np.ndarray, np.ndarray]] | None]


def _supervised(batches: list[PackedBatch], reads: list[Read]) -> Check:
    """The number of scored tokens: in the sums, in the targets and in the log."""
    summed = sum(int((read.targets != IGNORED).sum()) for read in reads)
    counted = sum(batch.num_scored for batch in batches)
    marked = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    share = f"{counted:,} of {tokens:,} tokens are supervised ({counted / tokens:.0%})"
    return check(GROUP, "supervised tokens", float(abs(summed - counted) + abs(marked - counted)), 0, share)


def _targets(reads: list[Read], expected: Targets, number: int) -> list[Check]:
    """Sequences whose inputs or targets differ from the row, or that are missing or duplicated of the `number`.

    Second check: sequences whose first learned token is not scored, or in which an earlier token is.
    """
    wrong, wrong_start, known = 0, 0, 0
    for read in reads:
        of_row = expected.get(read.row)
        if of_row is None:
            continue
        known += 1
        inputs, targets = of_row[read.side]
        wanted, found = (np.flatnonzero(t != IGNORED) for t in (targets, read.targets))
        wrong_start += not len(found) or found[0] != wanted[0]
        size = int(wanted[-1]) + 1  # later tokens are not read
        same = np.array_equal(read.inputs, inputs[:size]) and np.array_equal(read.targets, targets[:size])
        wrong += not same
    keys = {(read.row, read.side) for read in reads}
    wrong += len(reads) - len(keys) + abs(len(keys) - number)
    left = f", {len(reads) - known} cut or split rows skipped" if known < len(reads) else ""
    return [
        check(GROUP, "targets as the rows say", float(wrong), 0, f"{known} sequences rendered again{left}"),
        check(GROUP, "first reply token is scored", float(wrong_start), 0),
    ]


def _ends(subject: Subject, reads: list[Read], expected: dict[int, list[Expected]], by_row: dict[int, Any]) -> Check:
    """Replies, except cut ones, whose last scored token is not the end of turn."""
    end, wrong, number, cut = subject.tokenizer.end_of_turn_id, 0, 0, 0
    if end is None:
        return check(GROUP, "replies end with end of turn", float("nan"), 0, "the template writes no end-of-turn token")
    shift = 0 if subject.rewards else 1  # a token's target is the token after it; a reward is read at its last token
    for read in reads:
        whole = expected[read.row][read.side]
        example = by_row[read.row]
        left = 0
        if subject.method.paired:
            left = int(whole.learned.argmax()) - len(example.prompt_ids)  # tokens cut from the prompt's left
        for place in whole.ends:
            position = place - left - shift
            if position >= len(subject.sequences(example)[read.side].ids) - shift:
                cut += 1
                continue
            number += 1
            wrong += position >= len(read.targets) or read.targets[position] != end
    note = f"replies: {number}, id {end}" + (f"; {cut} cut by max_length" if cut else "")
    return check(GROUP, "replies end with end of turn", float(wrong), 0, note)


def _bos(subject: Subject, reads: list[Read]) -> Check:
    bos = subject.tokenizer.bos_id
    if bos is None:
        return check(GROUP, "one BOS at the start", 0, 0, "the tokenizer has none")
    # A template may write BOS before later turns too: "targets as the rows say" compares those.
    wrong = sum(read.inputs[0] != bos or bool((read.inputs[1:2] == bos).any()) for read in reads)
    return check(GROUP, "one BOS at the start", float(wrong), 0, f"{len(reads)} sequences, id {bos}")


def _gradient(subject: Subject, batches: list[PackedBatch], reads: list[list[Read]], expected: Targets) -> Check:
    """Largest gradient of a final hidden state at positions that teach nothing: prompts and padding."""
    worst, quiet = 0.0, 0
    for batch, of_batch in zip(batches, reads, strict=True):
        allowed = np.zeros(batch.input_ids.numel(), bool)
        for read in of_batch:
            of_row = expected.get(read.row)
            targets = read.targets if of_row is None else of_row[read.side][1]
            size = min(len(targets), len(read.columns))
            allowed[read.columns[:size][targets[:size] != IGNORED]] = True
        allowed &= batch.segment_ids.flatten().cpu().numpy() != PADDING
        sizes = hidden_gradients(subject, batch).abs().amax(-1).flatten().cpu().numpy()
        worst = max(worst, float(sizes[~allowed].max(initial=0)))
        quiet += int((~allowed).sum())
    return check(GROUP, "no gradient in prompts and padding", worst, 0, f"{quiet:,} positions")


def hidden_gradients(subject: Subject, batch: PackedBatch) -> Tensor:
    """Gradient of `method.loss` in the final hidden states, (rows, T, D)."""
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            kept.append(output.last_hidden_state)

    decoder: Any = subject.policy.causal_lm.get_decoder()
    subject.set_dropout(batch)
    with decoder.register_forward_hook(keep):
        subject.method.loss(subject.policy, batch).loss.backward()
    subject.policy.flat.grad.zero_()
    grads = [states.grad for states in kept if states.grad is not None]
    return torch.stack([grad.abs().float() for grad in grads]).sum(0)
