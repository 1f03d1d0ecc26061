"""A row as messages: read by the format of its source and checked; an unusable row gives one line that says why."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lowlevel.data.formats import LABEL, label_of
from lowlevel.data.readers import Completion, Completions
from lowlevel.data.rows import Row
from lowlevel.data.texts import WEIGHTS, BadRow, Columns, Message, is_filled, is_weight, value_of
from lowlevel.data.turns import MASKED, Turns, tools_of

# columns with which other trainers change the tokens or the loss; some formats read some of them
OF_OTHERS = (
    *("system", "system_prompt", "tools", "functions", "documents", "context", "history", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos", "weight"),
)
NO = ("false", "no", "bad", "undesirable", "rejected")  # texts in "label"
SCORES = [
    (f"{a}chosen{b}", f"{a}rejected{b}")
    for a, b in (("score_", ""), ("", "_score"), ("rating_", ""), ("", "_rating"), ("", "-rating"))
]


@dataclass(frozen=True)
class Normalised:
    """A row as messages. `completions` is () for a conversation, and (chosen, rejected) for a preference pair."""

    row: Row
    messages: list[Message]
    completions: Completions
    values: tuple[float, ...]  # of KTO the label, then the numbers in data.columns, in that order
    digest: str  # sha256 of the messages, and of values, tools, context and weights if there are any
    prompt_digest: str  # sha256 of the messages before the first reply
    warnings: tuple[str, ...]  # kinds of peculiarities with which the row can still be used
    tools: tuple[Message, ...] = ()  # for the chat template
    context: frozenset[int] = frozenset()  # indices of replies that are only context
    weight: float = 1.0  # of the row in the loss
    reply_weights: Mapping[int, float] = field(default_factory=dict)  # likewise, by index of a reply; the others have 1

    @property
    def texts(self) -> list[str]:
        """The text of each message and completion."""
        return [_text(said) for said in (*self.messages, *self.completions)]

    @property
    def replies(self) -> list[str]:
        """The text of each reply that can be learned."""
        learned = (m for i, m in enumerate(self.messages) if m["role"] == "assistant" and i not in self.context)
        return [_text(said) for said in (self.completions or learned)]


def normalise(row: Row, columns: Sequence[str] = (), weight_column: str | None = None) -> Normalised:
    """Check a row's content, convert it to messages and read the numbers in `columns` and its weight. Raises BadRow."""
    turns, completions = row.format.read(row.columns)
    messages, context = turns.messages, turns.context
    asks = row.format.method == "grpo" and messages[-1]["role"] in ("user", "tool")  # the model answers
    if not completions and not asks:
        _check_conversation(turns)
    labels = [label_of(row.columns)] if row.format.labelled else []
    read = (*columns, *([] if weight_column is None else [weight_column]))
    marked = [*read, *[LABEL] * len(labels)]
    _check_marks(row.columns, marked, str(messages[-1]["content"]), is_pair=bool(completions))
    weight = 1.0 if weight_column is None else _weight(row.columns, weight_column)
    reply_weights = {index: own for index, own in turns.weights.items() if own != 0}
    values = (*labels, *(_number(row.columns, name) for name in columns))
    said = (*messages, *(reply for reply in completions if not isinstance(reply, str)))
    tools = tools_of(row.columns, needed=any("tool_calls" in message for message in said))
    known = (*read, *row.format.aside, *(["tools"] if tools else []))
    first_reply = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    prompt = messages if completions else messages[:first_reply]
    scores = _scores(row.columns) if completions else ()
    warnings = [*turns.notes, *scores, *_ignored(row.columns, known, of_sft=row.format.method == "sft")]
    spoken = [m["role"] for m in messages if m["role"] != "system"] + ["assistant"] * bool(completions)
    late_system = any(m["role"] == "system" for m in messages[1:])
    twice = any(a == b != "tool" for a, b in zip(spoken, spoken[1:], strict=False))
    if late_system or twice or spoken[0] != "user":
        warnings.append("turns not alternating")
    if any(m["role"] == "user" and not m["content"].strip() for m in messages):
        warnings.append("empty user turn")
    marks = {"context": sorted(context), "reply_weights": sorted(reply_weights.items())}
    added = {"tools": tools, **marks, **({"weight": weight} if weight != 1 else {})}
    added = {key: value for key, value in added.items() if value}
    identity = digest([messages, completions, *([values] if values else []), *([added] if added else [])])
    return Normalised(
        row, messages, completions, values, identity, digest(prompt), tuple(warnings), tuple(tools), context,
        weight, reply_weights,
    )  # fmt: skip


def _text(said: Completion) -> str:
    return said if isinstance(said, str) else str(said["content"])


def _check_conversation(turns: Turns) -> None:
    messages = turns.messages
    replies = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    if not replies:
        raise BadRow("no assistant turn", "nothing to learn from (no assistant turn)")
    if messages[-1]["role"] != "assistant":
        raise BadRow("last turn not assistant", f'last turn is "{messages[-1]["role"]}", expected "assistant"')
    if messages[0]["role"] == "assistant":
        raise BadRow("no prompt", "first turn is an assistant reply without a prompt")
    if replies <= turns.context:
        raise BadRow("not to be learned", f"nothing to learn from ({MASKED}: all {len(replies)})")


def _check_marks(columns: Columns, read: Sequence[str], last: str, *, is_pair: bool) -> None:
    """Refuse rows whose columns say that they are not to be learned: KTO's undesired completions, and weight 0."""
    label, weight = columns.get("label"), _as_number(columns.get("weight"))
    number, word = _as_number(label), label.strip().lower() if isinstance(label, str) else None
    kto = label is False or "completion" in columns and number is not None and number <= 0 or word in NO
    if kto and not is_pair and "label" not in read and word != last.strip().lower():  # the name of a class, if equal
        shown = json.dumps(label)
        keep = "== true" if word is None else f"!= {shown}"
        hint = f"keep the others with [[data.filters]] label {keep}, or train on both with kto"
        raise BadRow("not to be learned", f'"label" is {shown}: an answer that is not to be learned; {hint}')
    if weight == 0 and "weight" not in read:
        hint = "keep the others with [[data.filters]] weight > 0"
        raise BadRow("not to be learned", f'"weight" is 0: the row is not to be learned; {hint}')


def _as_number(value: object) -> float | None:
    """A number, also one written as text (CSV files hold only texts); None for any other value."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def _scores(columns: Columns) -> Iterator[str]:
    """A warning about a pair whose scores contradict its order. It stays: scores and choices can have two authors."""
    for chosen, rejected in SCORES:
        better, worse = (_as_number(columns.get(name)) for name in (chosen, rejected))
        if better is not None and worse is not None and better <= worse:
            than = "less than" if better < worse else "equal to"
            yield f'pairs with "{chosen}" {than} "{rejected}" (are they swapped? data.filters can leave rows out)'


def _ignored(columns: Columns, read: Sequence[str], *, of_sft: bool) -> Iterator[str]:
    """Warnings about columns that would change training if they were read; a weight of 1 would not."""
    for name in OF_OTHERS:
        value = columns.get(name)
        if name not in read and is_filled(value) and not (name == "weight" and value == 1):
            hint = " (make it the first message)" if name in ("system", "system_prompt") else ""
            hint = ' (data.weight_column = "weight" reads it)' if name == "weight" and of_sft else hint
            yield f'column "{name}" ignored{hint}'


def digest(value: object) -> str:
    """sha256 of a value as canonical JSON."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _number(columns: Columns, name: str) -> float:
    try:
        number = float(value_of(columns, name, int | float, "a number"))
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow("not a finite number", f'"{name}" is {number}, expected a finite number')
    return number


def _weight(columns: Columns, name: str) -> float:
    weight = _number(columns, name)
    if weight == 0:
        hint = f"keep the others with [[data.filters]] {name} > 0"
        raise BadRow("not to be learned", f'"{name}" is 0: the row is not to be learned; {hint}')
    if not is_weight(weight):
        raise BadRow("unclear weight", f'"{name}" is {weight:g}, expected a weight from {WEIGHTS}')
    return weight
