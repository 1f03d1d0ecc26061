"""How rows of each format become messages: functions from the columns of a row. They raise BadRow."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from lowlevel.data.texts import SPEAKER, BadRow, Columns, Message, is_filled, is_transcript, reply_of, text_of, value_of
from lowlevel.data.turns import Turns, message, refuse_weights, turns_of, turns_or_none
from lowlevel.errors import quoted

Completion = str | Message  # a message if it has tool calls
Completions = tuple[()] | tuple[Completion, Completion]
Read = tuple[Turns, Completions]
PAIR = ("chosen", "rejected")
ADDED = ("input", "context")  # joined to the question by a blank line
SYSTEM = ("system", "system_prompt")
BOTH = 'columns "prompt" and "completion" ignored ("messages" is read)'
REPEATED = 20  # characters, or three words: shorter prompts are also the first words of right replies


def messages(columns: Columns) -> Read:
    """`messages`, or `prompt` and `completion`: each a text or messages. Replies in a prompt are context."""
    if "messages" in columns and (columns["messages"] is not None or "completion" not in columns):
        turns = turns_of(columns, "messages")
        unread = (BOTH,) if columns.get("completion") is not None else ()
        return replace(turns, notes=turns.notes + unread), ()
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
    said = {i: 0.0 for i, turn in enumerate(prompt.messages) if turn["role"] == "assistant"}
    return Turns(prompt.messages, said, tuple(set(prompt.notes))) + completion, ()


def prompts(columns: Columns) -> Read:
    """`prompt` alone, a text or messages: the model answers. Replies in it are context."""
    prompt = turns_or_none(columns, "prompt")
    prompt = message("user", text_of(columns, "prompt")) if prompt is None else prompt
    _check_prompt(prompt)
    return prompt, ()


def conversations(columns: Columns) -> Read:
    """ShareGPT: a list of messages, and a system text in a column of its own."""
    return _with_system(columns, turns_of(columns, "conversations")), ()


def conversation_pair(name: str) -> Callable[[Columns], Read]:
    """ShareGPT as LLaMA-Factory has it for pairs: the column `name` holds the prompt as a list of messages."""

    def read(columns: Columns) -> Read:
        return _pair(_with_system(columns, turns_of(columns, name)), *(_completion(columns, key) for key in PAIR))

    return read


def preference(columns: Columns) -> Read:
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


def orca(columns: Columns) -> Read:
    """System text, input and two completions; the system text can be empty."""
    prompt = message("system", text_of(columns, "system")) + message("user", text_of(columns, "input"))
    return _pair(prompt, *(_completion(columns, name) for name in PAIR))


def transcripts(columns: Columns) -> Read:
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


def asked(question: str, answer: str | None) -> Callable[[Columns], Read]:
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
    for name, turns in zip(
        ("a reply of the prompt", '"chosen"', '"rejected"'), (prompt, chosen, rejected), strict=True
    ):
        refuse_weights(name, turns)
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
        differ = "" if len(turns.messages) == 1 else _difference(prompt.messages, turns.messages, name)
        raise BadRow("completion is not one reply", f'"{name}" is not one assistant message after the prompt{differ}')
    if reply.context:
        raise BadRow("not to be learned", f'"{name}" is marked as not to be learned (weight 0)')
    return reply.messages[0] if "tool_calls" in reply.messages[0] else str(reply.messages[0]["content"])


def _difference(prompt: Sequence[Message], messages: Sequence[Message], name: str) -> str:
    """Where a conversation leaves its prompt, or nothing if it begins with it."""
    pairs = enumerate(zip(prompt, messages, strict=False), 1)
    turn, one, other = next(((i, a, b) for i, (a, b) in pairs if a != b), (0, {}, {}))
    shown = " and ".join(json.dumps(f"{m['role']}: {m['content']}"[:40], ensure_ascii=False) for m in (one, other) if m)
    return f'; turn {turn} of "prompt" and "{name}" differ: {shown}' if turn else ""


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
