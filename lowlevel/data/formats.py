"""The formats of rows: which columns a format has, and how they become messages.

A source has one format. `data.format` names it; "auto" takes the one that fits the columns. For kto a row is a
conversation whose last reply has a label, or a pair of completions as two such rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Literal

from lowlevel.config.schema import ONLINE
from lowlevel.data import readers
from lowlevel.data.readers import ADDED, PAIR, SYSTEM, Read
from lowlevel.data.rows import Row, SourceRows
from lowlevel.data.texts import BadRow, Columns, Message, decoded, is_message, is_transcript, number_as_text
from lowlevel.data.turns import Turns, refuse_weights
from lowlevel.errors import ConfigError, DataError, quoted

LABEL = "label"


def label_of(columns: Columns) -> float:
    """1 for a desirable completion, 0 for an undesirable one. Raises BadRow for anything but true, false, 1 and 0."""
    value = columns.get(LABEL)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    found = "is missing" if value is None else f"is {quoted(json.dumps(value, ensure_ascii=False)[:40])}"
    hint = '; convert it: row["label"] = row["label"] == "good"' if isinstance(value, str) else ""
    raise BadRow("label is not true or false", f'"label" {found}, expected true (desirable) or false{hint}')


def with_label(read: Callable[[Columns], Read]) -> Callable[[Columns], Read]:
    """A reader of conversations whose last reply is the completion; the replies before it are context."""

    def last_reply(columns: Columns) -> Read:
        turns, _ = read(columns)
        refuse_weights("a reply", turns)
        if len(turns.messages) - 1 in turns.context:
            raise BadRow("not to be learned", "the completion is marked as not to be learned (weight 0)")
        return _last_of(turns), ()

    return last_reply


def with_number(column: str, read: Callable[[Columns], Read]) -> Callable[[Columns], Read]:
    """A reader whose reply may be a number: it is only compared with."""
    return lambda columns: read({**columns, column: number_as_text(columns[column])} if column in columns else columns)


def halves(source: SourceRows) -> SourceRows:
    """Each pair as two rows, the chosen completion desirable, the rejected one undesirable; labelled rows as they are.

    A pair that cannot be read stays one row, so that its problem is told once.
    """
    if not source.rows or source.rows[0].format.labelled:
        return source
    rows: list[Row] = []
    half = replace(source.rows[0].format, read=partial(_half, source.rows[0].format.read), labelled=True)
    for row in source.rows:
        for side in PAIR if _is_readable(row) else PAIR[:1]:
            columns = {**row.columns, LABEL: side == "chosen"}
            rows.append(replace(row, id=len(rows), where=f"{row.where} {side}", columns=columns, format=half))
    read_as = "; ".join(filter(None, (source.read_as, "each pair as a desirable and an undesirable completion")))
    return replace(source, rows=rows, read_as=read_as)


def _is_readable(row: Row) -> bool:
    try:
        row.format.read(row.columns)
    except BadRow:
        return False
    return True


def _half(read: Callable[[Columns], Read], columns: Columns) -> Read:
    prompt, pair = read(columns)
    reply = pair[0 if columns[LABEL] else 1]  # type: ignore[misc]
    message: Message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
    return _last_of(Turns([*prompt.messages, message], notes=prompt.notes)), ()


def _last_of(turns: Turns) -> Turns:
    """The same turns, of whose replies only the last is learned."""
    replies = [i for i, message in enumerate(turns.messages) if message["role"] == "assistant"]
    return replace(turns, weights=dict.fromkeys(replies[:-1], 0.0))


Method = Literal["sft", "dpo", "kto", "grpo"]
QUESTIONS = ("question", "query", "instruction", "input")
ANSWERED = (
    *(("instruction", "output"), ("question", "answer"), ("question", "response"), ("instruction", "response")),
    *(("query", "response"), ("query", "answer"), ("prompt", "response"), ("prompt", "answer"), ("input", "output")),
)
ASIDE = (*SYSTEM, *ADDED, "history")  # read next to a question
READ_ME = "lowlevel/data/README.md, Row formats"


@dataclass(frozen=True)
class Format:
    """Columns that a row must have, and a function from columns to messages (SFT, KTO) or prompt and completions."""

    name: str  # in data.format
    title: str
    method: Method
    columns: tuple[str, ...]
    read: Callable[[Columns], Read]
    aside: tuple[str, ...] = ()  # columns that it also reads
    first: bool = False  # taken before formats that fit, too
    fits: Callable[[Columns], bool] = lambda columns: True  # whether the values of a row can be this format
    labelled: bool = False  # the first of a row's values is its label (KTO)

    def describe(self, columns: Columns) -> str:
        """How the report says it, from a row of the source; "" for the plain formats."""
        given = columns.get(self.columns[0])
        shared = isinstance(given, list) and bool(given) and isinstance(given[0], dict) and "from" in given[0]
        if self.name in ("messages", "preference"):
            return f"ShareGPT: {self.columns[0]}" if shared else ""
        if self.name == "sharegpt" and not shared:
            return f"lists of messages: {', '.join(self.columns)}"
        added = [name for name in ADDED if name in self.aside and name in columns and name != self.columns[0]]
        joined = f" ({self.columns[0]} and {' and '.join(added)} joined by a blank line)" if added else ""
        names = [*self.columns, *(name for name in self.aside if name in columns and name not in self.columns)]
        return f"{self.title}: {', '.join(names)}{joined}"


def _hh(columns: Columns) -> bool:
    return any(is_transcript(columns.get(name)) for name in ("prompt", *PAIR))


def _holds_prompt(columns: Columns) -> bool:
    """Whether `chosen` is a conversation, so that no column of the prompt is needed."""
    value = columns.get("chosen")
    try:
        found = decoded(value, "chosen") if isinstance(value, str) else value
    except BadRow:
        return True  # its message says more
    return isinstance(found, list) and len(found) > 1


def _asks_in_messages(columns: Columns) -> bool:
    """Whether the prompt is a list; "answer" beside it is for reward functions."""
    return isinstance(columns.get("prompt"), list)


def _question_formats() -> Iterator[Format]:
    for question, answer in ANSWERED:
        alpaca = answer == "output" and question == "instruction"
        name, title = ("alpaca", "Alpaca") if alpaca else ("question", "question and answer")
        yield Format(name, title, "sft", (question, answer), readers.asked(question, answer), ASIDE)
    for question in QUESTIONS:
        name, title = ("alpaca", "Alpaca pairs") if question == "instruction" else ("question", "question and pair")
        yield Format(name, title, "dpo", (question, *PAIR), readers.asked(question, None), ASIDE)


FORMATS = (
    Format("messages", "messages", "sft", ("messages",), readers.messages, first=True),
    Format("messages", "messages", "sft", ("prompt", "completion"), readers.messages, first=True),
    Format("sharegpt", "ShareGPT", "sft", ("conversations",), readers.conversations, SYSTEM),
    Format("hh", "HH transcripts", "dpo", PAIR, readers.transcripts, ("prompt",), True, _hh),
    Format("preference", "preference", "dpo", ("prompt", *PAIR), readers.preference, first=True),
    Format("preference", "preference", "dpo", PAIR, readers.preference, first=True, fits=_holds_prompt),
    Format("orca", "Orca", "dpo", ("system", "input", *PAIR), readers.orca, ("system",), True),
    *(
        Format("sharegpt", title, "dpo", (column, *PAIR), readers.conversation_pair(column), SYSTEM)
        for column, title in (("conversations", "ShareGPT pairs"), ("messages", "messages and pair"))
    ),
    *_question_formats(),
)
FORMATS += tuple(
    replace(f, method="kto", columns=(*f.columns, LABEL), read=with_label(f.read), labelled=True)
    for f in FORMATS
    if f.method == "sft"
)
FORMATS += (
    *(replace(f, method="grpo", read=with_number(f.columns[-1], f.read)) for f in FORMATS if f.method == "sft"),
    Format("prompt", "prompts", "grpo", ("prompt",), readers.prompts, first=True, fits=_asks_in_messages),
    Format("prompt", "prompts", "grpo", ("prompt",), readers.prompts),
)
NO_NUMBERS: Mapping[str, str] = MappingProxyType({})


def recognised(source: SourceRows, name: str, method: str, numbers: Mapping[str, str] = NO_NUMBERS) -> SourceRows:
    """The source with the format of its rows: `name`, from data.format, or the one that fits the columns.

    Raises DataError if no format fits, or several; ConfigError for an absent column of `numbers`, data.numbers.
    """
    if not source.rows:
        return source
    method = "dpo" if method == "reward" else "grpo" if method in ONLINE else method
    found = sorted({column for row in source.rows for column in row.columns})
    absent = next((column for column in numbers if column not in found), None)
    if absent is not None:
        raise ConfigError(f'{numbers[absent]}: {source.name} has no column "{quoted(absent)}"; found: {listed(found)}')
    filled = {column for row in source.rows for column, value in row.columns.items() if value is not None}
    methods = (method, "dpo") if method == "kto" else (method,)  # of a pair, both completions have a label
    formats = [f for f in FORMATS if f.method in methods and name in ("auto", f.name)]
    fitting = _fitting(source, formats, filled) or _fitting(source, formats, set(found))
    if len(fitting) != 1:
        raise DataError(_several(source.name, fitting) if fitting else _none(source, found, formats, method))
    (chosen,) = fitting
    sample = next((row.columns for row in source.rows if _has(row.columns, chosen)), source.rows[0].columns)
    rows = [replace(row, format=chosen) for row in source.rows]
    return replace(source, rows=rows, read_as=chosen.describe(sample))


def _has(columns: Columns, candidate: Format) -> bool:
    return all(columns.get(name) is not None for name in candidate.columns)


def _fitting(source: SourceRows, formats: Sequence[Format], found: set[str]) -> list[Format]:
    """The first format that goes first, otherwise all that fit and read more than another one."""
    fitting = []
    for candidate in formats:
        if set(candidate.columns) <= found:
            samples = (row.columns for row in source.rows if _has(row.columns, candidate))
            if candidate.fits(next(samples, source.rows[0].columns)):
                fitting.append(candidate)
    if first := [candidate for candidate in fitting if candidate.first]:
        return first[:1]
    return [
        candidate
        for candidate in fitting
        if not any(
            set(candidate.columns) <= {*other.columns, *other.aside}
            for other in fitting
            if other is not candidate and not set(other.columns) <= {*candidate.columns, *candidate.aside}
        )
    ]


def _several(source: str, fitting: Sequence[Format]) -> str:
    shown = "; ".join(f"{f.title} ({', '.join(f.columns)})" for f in fitting)
    names = list(dict.fromkeys(f.name for f in fitting))
    choice = " or ".join(f'"{name}"' for name in names)
    mend = f"set data.format to {choice}" if len(names) > 1 else "rename or remove the columns of others"
    return f"{source}: its columns fit several formats: {shown}; {mend}"


def _none(source: SourceRows, found: Sequence[str], formats: Sequence[Format], method: str) -> str:
    """No format fits: the columns, the nearest format and what it lacks, or a format that fits."""
    have = set(found)
    lacking = [f for f in formats if not set(f.columns) <= have]
    nearest = max(lacking, key=lambda f: (len(have & set(f.columns)), -len(f.columns)))
    missing = ", ".join(column for column in nearest.columns if column not in have)
    problem = f"{source.name}: no format of {method.upper()} rows fits the columns; found: {listed(found)}"
    if missing == LABEL:
        return f"{problem}; missing: {LABEL}, true for desirable and false for undesirable completions"
    if other := next(iter(_fitting(source, [f for f in FORMATS if f.method == method], have)), None):
        return f'{problem}; missing: {missing}; they fit data.format = "{other.name}"'
    others = sorted((f for f in FORMATS if f.method not in (method, "grpo")), key=lambda f: not f.labelled)
    if other := next(iter(_fitting(source, others, have)), None):
        return f"{problem}; they fit {other.method.upper()} ({', '.join(other.columns)})"
    if "text" in have:
        hint = 'does not say which part is the reply: split it into "prompt" and "completion", or "messages"'
        return f'{problem}; "text" {hint}'
    lists = [(name, v) for name, v in sorted(source.rows[0].columns.items()) if isinstance(v, list) and v]
    if listing := next((name for name, value in lists if is_message(value[0])), None):
        return f'{problem}; rename "{quoted(listing)}", a list of messages, to "{nearest.columns[0]}"'
    near = f"{', '.join(nearest.columns)} (missing: {missing}); rename them"
    if not have & set(nearest.columns):
        near = f"{' or '.join(dict.fromkeys('+'.join(f.columns) for f in formats if f.first))}; rename yours"
    return f"{problem}; nearest: {near} ({READ_ME})"


def listed(columns: Sequence[str], shown: int = 20) -> str:
    """Names of columns for a message: the first 20, and the number of the others."""
    more = f" and {len(columns) - shown:,} more" if len(columns) > shown else ""
    return ", ".join(quoted(column) for column in columns[:shown]) + more
