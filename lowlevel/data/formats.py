"""The formats of rows: which columns a format has, and how they become messages.

A source has one format. `data.format` names it; "auto" takes the one that fits the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from lowlevel.config.schema import ONLINE
from lowlevel.data import readers
from lowlevel.data.labelled import LABEL, with_label
from lowlevel.data.readers import ADDED, PAIR, SYSTEM, Read
from lowlevel.data.sources import SourceRows
from lowlevel.data.texts import BadRow, Columns, decoded, is_message, is_transcript
from lowlevel.errors import ConfigError, DataError, quoted

Method = Literal["sft", "dpo", "kto", "grpo"]
QUESTIONS = ("question", "query", "instruction", "input")
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


def _holds_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and is_message(value[0])


def _asks_in_messages(columns: Columns) -> bool:
    """Whether the prompt is a list; "answer" beside it is for reward functions."""
    return isinstance(columns.get("prompt"), list)


def _question_formats() -> Iterator[Format]:
    for question, answer in (
        *(("instruction", "output"), ("question", "answer"), ("question", "response"), ("instruction", "response")),
        *(
            ("query", "response"),
            ("query", "answer"),
            ("prompt", "response"),
            ("prompt", "answer"),
            ("input", "output"),
        ),
    ):
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
    Format(
        "sharegpt",
        "ShareGPT pairs",
        "dpo",
        ("conversations", *PAIR),
        readers.conversation_pair("conversations"),
        SYSTEM,
    ),
    Format("sharegpt", "messages and pair", "dpo", ("messages", *PAIR), readers.conversation_pair("messages"), SYSTEM),
    *_question_formats(),
)


FORMATS += tuple(
    replace(f, method="kto", columns=(*f.columns, LABEL), read=with_label(f.read), labelled=True)
    for f in FORMATS
    if f.method == "sft"
)
FORMATS += (
    *(replace(f, method="grpo") for f in FORMATS if f.method == "sft"),
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
    if listing := next((name for name in found if _holds_messages(source.rows[0].columns.get(name))), None):
        return f'{problem}; rename "{quoted(listing)}", a list of messages, to "{nearest.columns[0]}"'
    near = f"{', '.join(nearest.columns)} (missing: {missing}); rename them"
    if not have & set(nearest.columns):
        near = f"{' or '.join(dict.fromkeys('+'.join(f.columns) for f in formats if f.first))}; rename yours"
    return f"{problem}; nearest: {near} ({READ_ME})"


def listed(columns: Sequence[str], shown: int = 20) -> str:
    """Names of columns for a message: the first 20, and the number of the others."""
    more = f" and {len(columns) - shown:,} more" if len(columns) > shown else ""
    return ", ".join(quoted(column) for column in columns[:shown]) + more
