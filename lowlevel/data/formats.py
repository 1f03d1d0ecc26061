"""The formats of rows: which columns a format has, and how they become messages.

A source has one format. `data.format` names it; "auto" takes the one that fits the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowlevel.data.sources import SourceRows
from lowlevel.data.turns import (
    SPEAKER,
    BadRow,
    Columns,
    Message,
    Turns,
    decoded,
    is_filled,
    is_transcript,
    message,
    reply_of,
    text_of,
    turns_of,
    turns_or_none,
    value_of,
)
from lowlevel.errors import ConfigError, DataError, quoted

Method = Literal["sft", "dpo"]
Completion = str | Message  # a message if it has tool calls
Completions = tuple[()] | tuple[Completion, Completion]
Read = tuple[Turns, Completions]
PAIR = ("chosen", "rejected")
QUESTIONS = ("question", "query", "instruction", "input")
ADDED = ("input", "context")  # joined to the question by a blank line
SYSTEM = ("system", "system_prompt")
ASIDE = (*SYSTEM, *ADDED, "history")  # read next to a question
READ_ME = "lowlevel/data/README.md, Row formats"
REPEATED = 20  # characters, or three words: shorter prompts are also the first words of right replies


@dataclass(frozen=True)
class Format:
    """Columns that a row must have, and a function from columns to messages (SFT), or prompt and completions (DPO)."""

    name: str  # in data.format
    title: str
    method: Method
    columns: tuple[str, ...]
    read: Callable[[Columns], Read]
    aside: tuple[str, ...] = ()  # columns that it also reads
    first: bool = False  # taken before formats that fit, too
    fits: Callable[[Columns], bool] = lambda columns: True  # whether the values of a row can be this format

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


def _messages(columns: Columns) -> Read:
    """`messages`, or `prompt` and `completion`: each a text or messages. Replies in a prompt are context."""
    if "messages" in columns and (columns["messages"] is not None or "completion" not in columns):
        return turns_of(columns, "messages"), ()
    prompt, completion = turns_or_none(columns, "prompt"), turns_or_none(columns, "completion")
    if prompt is None and completion is None:
        asked, answer = text_of(columns, "prompt"), reply_of(columns, "completion")
        _check_repeated(asked, completion=answer)
        return message("user", asked) + message("assistant", answer), ()
    prompt = message("user", text_of(columns, "prompt")) if prompt is None else prompt
    completion = message("assistant", reply_of(columns, "completion")) if completion is None else completion
    _check_prompt(prompt)
    if completion.messages[: len(prompt.messages)] == prompt.messages:
        completion = completion.after(len(prompt.messages))
    if not completion.messages or completion.messages[0]["role"] != "assistant":
        raise BadRow("completion is not a reply", '"completion" does not begin with an assistant message')
    said = frozenset(i for i, turn in enumerate(prompt.messages) if turn["role"] == "assistant")
    return Turns(prompt.messages, said, tuple(set(prompt.notes))) + completion, ()


def _conversations(columns: Columns) -> Read:
    return _with_system(columns, turns_of(columns, "conversations")), ()


def _conversation_pair(columns: Columns) -> Read:
    prompt = _with_system(columns, turns_of(columns, "conversations"))
    return _pair(prompt, *(_completion(columns, name) for name in PAIR))


def _preference(columns: Columns) -> Read:
    """`chosen` and `rejected`: texts, one message, or conversations. These hold the prompt, or a column does."""
    chosen, rejected = (_completion(columns, name) for name in PAIR)
    prompt = turns_or_none(columns, "prompt")
    whole = min(len(chosen.messages), len(rejected.messages)) > 1
    if columns.get("prompt") is None and whole:
        _check_same_prompt(chosen.messages, rejected.messages)
        return _pair(Turns(chosen.messages[:-1], notes=chosen.notes), chosen, rejected)
    if prompt is None:
        asked = text_of(columns, "prompt")
        if whole:  # as in UltraFeedback's binarised pairs, "prompt" is the text of the last question
            _check_same_prompt(chosen.messages, rejected.messages)
            _check_same_question(asked, chosen.messages)
            return _pair(Turns(chosen.messages[:-1]), chosen, rejected)
        if all(isinstance(columns.get(name), str) for name in PAIR):
            _check_repeated(asked, chosen=str(columns["chosen"]), rejected=str(columns["rejected"]))
        return _pair(message("user", asked), chosen, rejected)
    if whole and _stripped(chosen.messages[:-1]) == _stripped(rejected.messages[:-1]) == _stripped(prompt.messages):
        return _pair(replace(prompt, messages=chosen.messages[:-1]), chosen, rejected)
    return _pair(prompt, chosen, rejected)


def _orca(columns: Columns) -> Read:
    prompt = message("system", text_of(columns, "system")) + message("user", text_of(columns, "input"))
    return _pair(prompt, *(_completion(columns, name) for name in PAIR))


def _transcripts(columns: Columns) -> Read:
    """Anthropic's HH: the last turn of a transcript is the completion, both transcripts share the turns before it."""
    chosen, rejected = (_transcript(columns, name) for name in PAIR)
    _check_same_prompt(chosen, rejected)
    return _pair(Turns(chosen[:-1]), Turns(chosen[-1:]), Turns(rejected[-1:]))


def _transcript(columns: Columns, name: str) -> list[Message]:
    text, prompt = str(value_of(columns, name, str, "text")), columns.get("prompt")
    if isinstance(prompt, str) and is_filled(prompt) and not text.lstrip().startswith(prompt.strip()):
        text = f"{prompt.rstrip()} {text.strip()}"
    if not is_transcript(text):
        raise BadRow("no transcript", f'"{name}" has no turns "Human: ..." and "Assistant: ..."')
    _, *parts = SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        raise BadRow(f"empty {name}", f'"{name}" does not end with an answer of the assistant')
    return turns


def _asked(question: str, answer: str | None) -> Callable[[Columns], Read]:
    """Read a question, with a system text, more input and earlier turns; without `answer`, a pair of completions."""

    def read(columns: Columns) -> Read:
        added = [name for name in ADDED if name != question and is_filled(columns.get(name))]
        texts = [text_of(columns, name) for name in (question, *added)]
        asked = "\n\n".join(text for text in texts if text.strip())
        prompt = _with_system(columns, _history(columns) + message("user", asked))
        if answer is None:
            return _pair(prompt, *(_completion(columns, name) for name in PAIR))
        return prompt + message("assistant", reply_of(columns, answer)), ()

    return read


def _history(columns: Columns) -> Turns:
    """Earlier turns: a list of questions with their answers."""
    turns = Turns([])
    for item in columns.get("history") or ():  # type: ignore[attr-defined]
        if not isinstance(item, list) or len(item) != 2 or not all(isinstance(text, str) for text in item):
            raise BadRow("history", '"history" is not a list of [question, answer]')
        turns += message("user", item[0]) + message("assistant", item[1])
    return turns


def _with_system(columns: Columns, turns: Turns) -> Turns:
    """The turns after the text of a system column."""
    name = next((name for name in SYSTEM if is_filled(columns.get(name))), None)
    if name is None:
        return turns
    system = message("system", text_of(columns, name))
    if turns.messages[0]["role"] != "system":
        return system + turns
    if turns.messages[0] != system.messages[0]:
        raise BadRow("two system texts", f'"{name}" and the first message are two different system texts')
    return turns


def _completion(columns: Columns, name: str) -> Turns:
    value = columns.get(name)
    if value == []:
        raise BadRow(f"empty {name}", f"empty {name}")
    turns = turns_or_none(columns, name)
    return message("assistant", reply_of(columns, name)) if turns is None else turns


def _pair(prompt: Turns, chosen: Turns, rejected: Turns) -> Read:
    _check_prompt(prompt)
    texts = [_reply(name, turns, prompt) for name, turns in zip(PAIR, (chosen, rejected), strict=True)]
    if texts[0] == texts[1]:
        raise BadRow("chosen = rejected", "chosen and rejected are the same text")
    notes = tuple(dict.fromkeys(prompt.notes + chosen.notes + rejected.notes))
    return Turns(prompt.messages, notes=notes), (texts[0], texts[1])


def _reply(name: str, turns: Turns, prompt: Turns) -> Completion:
    """A completion: one assistant message, or the last one of a conversation that begins with the prompt."""
    size = len(prompt.messages)
    reply = turns.after(size) if turns.messages[:size] == prompt.messages else turns
    if [turn["role"] for turn in reply.messages] != ["assistant"]:
        raise BadRow("completion is not one reply", f'"{name}" is not one assistant message after the prompt')
    if reply.context:
        raise BadRow("not to be learned", f'"{name}" is marked as not to be learned (weight 0)')
    return reply.messages[0] if "tool_calls" in reply.messages[0] else str(reply.messages[0]["content"])


def _check_prompt(prompt: Turns) -> None:
    if prompt.messages[-1]["role"] == "assistant":
        raise BadRow("prompt ends with assistant", 'the last turn of "prompt" is "assistant", expected "user"')


def _check_same_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen, rejected, strict=False)
        turn = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), min(len(chosen), len(rejected)))
        problem = f'"chosen" and "rejected" differ before their last turn (turn {turn}): they must share the prompt'
        raise BadRow("no common prompt", problem)


def _check_same_question(asked: str, messages: Sequence[Message]) -> None:
    found = str(messages[-2]["content"])
    if asked.strip() != found.strip():
        a, b = asked.strip(), found.strip()
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shown = " and ".join(f'"{quoted(text[place : place + 30])}"' for text in (a, b))
        where = f'the question in "chosen" (turn {len(messages) - 1}) from character {place + 1}: {shown}'
        raise BadRow("prompt differs", f'"prompt" differs from {where}; remove "prompt" or correct it')


def _check_repeated(prompt: str, **replies: str) -> None:
    """Refuse replies that are the whole prompt and more: the prompt would be learned as the reply's beginning."""
    start = prompt.strip()
    if len(start) < REPEATED and len(start.split()) < 3:
        return
    rests = [text.lstrip()[len(start) :] for text in replies.values() if text.lstrip().startswith(start)]
    if len(rests) == len(replies) and all(any(char.isalnum() for char in rest) for rest in rests):
        names = " and ".join(f'"{name}"' for name in replies)
        verb = "begins" if len(replies) == 1 else "begin"
        hint = "give the reply alone; if it is to repeat the prompt, give both as messages"
        raise BadRow("prompt repeated in the reply", f"{names} {verb} with the whole prompt; {hint}")


def _stripped(messages: Sequence[Message]) -> list[Message]:
    return [{**turn, "content": turn["content"].strip()} for turn in messages]


def _hh(columns: Columns) -> bool:
    return any(is_transcript(columns.get(name)) for name in PAIR)


def _holds_prompt(columns: Columns) -> bool:
    """Whether `chosen` is a conversation, so that no column of the prompt is needed."""
    value = columns.get("chosen")
    try:
        found = decoded(value, "chosen") if isinstance(value, str) else value
    except BadRow:
        return True  # its message says more
    return isinstance(found, list) and len(found) > 1


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
        yield Format(name, title, "sft", (question, answer), _asked(question, answer), ASIDE)
    for question in QUESTIONS:
        name, title = ("alpaca", "Alpaca pairs") if question == "instruction" else ("question", "question and pair")
        yield Format(name, title, "dpo", (question, *PAIR), _asked(question, None), ASIDE)


FORMATS = (
    Format("messages", "messages", "sft", ("messages",), _messages, first=True),
    Format("messages", "messages", "sft", ("prompt", "completion"), _messages, first=True),
    Format("sharegpt", "ShareGPT", "sft", ("conversations",), _conversations, SYSTEM),
    Format("hh", "HH transcripts", "dpo", PAIR, _transcripts, ("prompt",), True, _hh),
    Format("preference", "preference", "dpo", ("prompt", *PAIR), _preference, first=True),
    Format("preference", "preference", "dpo", PAIR, _preference, first=True, fits=_holds_prompt),
    Format("orca", "Orca", "dpo", ("system", "input", *PAIR), _orca, ("system",), True),
    Format("sharegpt", "ShareGPT pairs", "dpo", ("conversations", *PAIR), _conversation_pair, SYSTEM),
    *_question_formats(),
)


def recognised(source: SourceRows, name: str, method: str, numbers: Sequence[str] = ()) -> SourceRows:
    """The source with the format of its rows: `name`, from data.format, or the one that fits the columns.

    Raises DataError if no format fits, or several; ConfigError for a column in `numbers`, data.columns, that is absent.
    """
    found = sorted({column for row in source.rows for column in row.columns})
    absent = next((column for column in numbers if column not in found), None)
    if absent is not None:
        raise ConfigError(f'data.columns: {source.name} has no column "{quoted(absent)}"; found: {listed(found)}')
    filled = {column for row in source.rows for column, value in row.columns.items() if value is not None}
    formats = [f for f in FORMATS if f.method == method and name in ("auto", f.name)]
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
    if other := next(iter(_fitting(source, [f for f in FORMATS if f.method == method], have)), None):
        return f'{problem}; missing: {missing}; they fit data.format = "{other.name}"'
    if other := next(iter(_fitting(source, [f for f in FORMATS if f.method != method], have)), None):
        return f"{problem}; they fit {other.method.upper()} ({', '.join(other.columns)})"
    if "text" in have:
        hint = 'does not say which part is the reply: split it into "prompt" and "completion", or "messages"'
        return f'{problem}; "text" {hint}'
    return f"{problem}; nearest: {', '.join(nearest.columns)} (missing: {missing}); rename them ({READ_ME})"


def listed(columns: Sequence[str], shown: int = 20) -> str:
    """Names of columns for a message: the first 20, and the number of the others."""
    more = f" and {len(columns) - shown:,} more" if len(columns) > shown else ""
    return ", ".join(quoted(column) for column in columns[:shown]) + more
