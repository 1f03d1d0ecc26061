"""Render messages with a chat template, and find the characters that the assistant wrote.

Those characters come from the template's {% generation %} markers or, without markers, from rendering turn by turn.
A template is third-party code. The Jinja sandbox of transformers runs it: no access to Python internals, range() up to
100,000. Nested loops are not limited, so a template can be slow.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lowlevel.errors import DataError, one_line

Message = Mapping[str, Any]
Span = tuple[int, int]
NOT_A_PREFIX = "prompt tokens are not a prefix of prompt+answer tokens"
OTHER_TEMPLATE = "data.chat_template_from can name another template"
SYSTEM_HINT = f" (it takes no system messages: put their text into the first user message; {OTHER_TEMPLATE})"
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAGS = re.compile(r"</?\w+>")
SHOWN = 40  # characters of a rendering in an error
DATE_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "YymdBbAajHMSIpF"))  # of strftime, as templates use them
DATE = datetime.date(2024, 7, 26)  # Llama 3.1's default date


class RenderError(DataError):
    """The template refuses a conversation, or the rendered prompt is not a prefix of the rendered conversation."""


class Reply(NamedTuple):
    """A reply, or a marked part of one: text[start:end], with the end-of-turn token; `turn` indexes its message."""

    start: int
    end: int
    turn: int


@dataclass(frozen=True)
class Rendering:
    """Text of a conversation and the character ranges of its replies; generation starts from text[:start].

    Some templates change a reply once more turns follow (Qwen 3 removes its <think> part). The changed form is not what
    the model should generate, so it is context only: `changed` counts such replies, `replies` leaves them out.
    """

    text: str
    replies: list[Reply]
    changed: int


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the values that it can use."""

    text: str  # Jinja source
    variables: Mapping[str, Any]  # names such as eos_token with their values
    date: datetime.date = DATE  # for templates that print today's date: the same rows give the same tokens tomorrow
    # what its probe found (template_probe.py)
    end_of_turn: str = ""  # special token that ends a reply; "" if the template writes none
    after_turn: str = ""  # text after it at the end of a conversation: a newline, in Phi 3 also another token
    lead: str = ""  # text between a prompt and a reply's content, part of what the model writes: Qwen 3's empty <think>
    refuses_system: bool = False
    warnings: tuple[str, ...] = ()  # a line for each thing that is learned wrongly or not at all
    notes: tuple[str, ...] = ()  # other peculiarities

    @property
    def sha256(self) -> str:
        """Identity of the template's text."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @property
    def asks_for_date(self) -> bool:
        """Whether the template's text depends on the date."""
        return "strftime_now" in self.text

    @property
    def has_markers(self) -> bool:
        """Whether the template marks the assistant's text."""
        return MARKERS.search(self.text) is not None

    def with_tools(self, tools: Sequence[Message]) -> ChatTemplate:
        """The template for conversations with these tools."""
        return replace(self, variables={**self.variables, "tools": list(tools)}) if tools else self

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Text of a conversation, with the opening of a reply if `add_generation_prompt`. Raises RenderError."""
        return self._render(messages, add_generation_prompt)[0]

    def text_and_replies(self, messages: Sequence[Message]) -> Rendering:
        """Text of a conversation with the positions of its replies.

        Raises RenderError if the template refuses it, or if the prompt of the last reply is not a prefix of it.
        """
        text, marked = self._render(messages, False)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._reply(messages, turn, text) for turn in turns]
        replies = [span for span in spans if span is not None]
        changed = spans.count(None)
        if self.has_markers:
            replies, unknown = self._marked(text, marked, replies)
            changed = min(changed, unknown)
        for start, end, turn in replies:
            self._check_reply(text[start:end], messages[turn]["content"], turn)
        for turn in turns:
            own = "".join(text[reply.start : reply.end] for reply in replies if reply.turn == turn)
            check_calls(own or text, messages[turn], turn)
        return Rendering(text, replies, changed)

    def text_and_cut(self, prompt: Sequence[Message], reply: str | Message, supervise: str) -> tuple[str, int]:
        """Text of a prompt with one reply, and the index of the reply's first character.

        With supervise "assistant" the text ends after the end-of-turn token, with "all" where the template ends it.
        """
        prefix = self.render(prompt, add_generation_prompt=True)
        answer = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
        text = self.render([*prompt, answer], add_generation_prompt=False)
        if not text.startswith(prefix):
            raise RenderError(_no_prefix(prefix, text, len(prompt)))
        for turn in (turn for turn, message in enumerate(prompt) if "tool_calls" in message):
            before, through = (self.render(prompt[:count], add_generation_prompt=False) for count in (turn, turn + 1))
            check_calls(through[len(os.path.commonprefix([before, through])) :], prompt[turn], turn)
        end = self._reply_end(text, len(text))
        self._check_reply(text[len(prefix) : end], answer["content"], len(prompt))
        check_calls(text[len(prefix) : end], answer, len(prompt))
        return text if supervise == "all" else text[:end], len(prefix)

    def _reply(self, messages: Sequence[Message], turn: int, text: str) -> Reply | None:
        """Range of a reply in the text; None if later turns change the reply or its prompt."""
        prefix = self.render(messages[:turn], add_generation_prompt=True)
        last = turn == len(messages) - 1
        through = text if last else self.render(messages[: turn + 1], add_generation_prompt=False)
        if through.startswith(prefix):
            end = self._reply_end(through, len(through))
            if text.startswith(through[:end]):
                return Reply(len(prefix), self._reply_end(text, end) if end == len(through) else end, turn)
        if last:
            raise RenderError(_no_prefix(prefix, text, turn))
        return None

    def _marked(self, text: str, marked: Sequence[Span], replies: Sequence[Reply]) -> tuple[list[Reply], int]:
        """The marked parts of the replies, and the number of marks outside of them.

        A marked reply begins where generation starts, even if its mark begins elsewhere: a mark around the header would
        teach the model to write it, a mark behind a forced text to leave it out.
        """
        parts: list[Reply] = []
        marks = [(start, self._reply_end(text, end)) for start, end in marked if start < end]
        for start, end in marks:
            for reply in replies:
                if start < reply.end and reply.start < end:
                    follows = bool(parts) and parts[-1].turn == reply.turn
                    parts.append(Reply(start if follows else reply.start, end, reply.turn))
        return parts, len(marks) - len(parts)

    def _check_reply(self, written: str, content: str, turn: int) -> None:
        """Raise RenderError if a rendered reply lacks a part of its content.

        Templates may remove blanks around it, and move or remove tags such as <think>.
        """
        inside = written.removeprefix(self.lead).removesuffix(self.end_of_turn)
        if content.strip() not in inside and not all(part.strip() in inside for part in TAGS.split(content)):
            own, made = (json.dumps(part[:SHOWN], ensure_ascii=False) for part in (content, inside))
            lost = f"leaves out or changes a part of the reply (turn {turn + 1})"
            raise RenderError(f"the chat template {lost}: {own} became {made}; {OTHER_TEMPLATE}")

    def _reply_end(self, text: str, end: int) -> int:
        """End of the end-of-turn token. `end` can be after it, or before it (markers around the content only)."""
        if self.end_of_turn and text.endswith(self.end_of_turn + self.after_turn, 0, end):
            return end - len(self.after_turn)
        if self.end_of_turn and text.startswith(self.end_of_turn, end):
            return end + len(self.end_of_turn)
        return end

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        fixed_date = ""
        if self.asks_for_date:  # transformers' `strftime_now`, redefined with a fixed date
            directives = "".join(f" | replace('{code}', '{self.date.strftime(code)}')" for code in DATE_CODES)
            fixed_date = "{%- macro strftime_now(format) -%}{{ format" + directives + " }}{%- endmacro -%}{{ '' }}"
        options: dict[str, Any] = {
            **self.variables,
            "chat_template": fixed_date + self.text,
            "return_assistant_tokens_mask": self.has_markers,
            "add_generation_prompt": add_generation_prompt,
        }
        # annotated as returning str in transformers 5.23, but returns (texts, marked ranges)
        render: Any = chat_template_utils.render_jinja_template
        try:
            texts, marked = render([[dict(message) for message in messages]], **options)
        except Exception as error:  # third-party code can raise anything
            hint = SYSTEM_HINT if self.refuses_system and messages[0]["role"] == "system" else ""
            raise RenderError(f"the chat template refuses the row: {one_line(error)}{hint}") from None
        return texts[0], list(marked[0]) if marked else []


def check_calls(written: str, message: Message, turn: int) -> None:
    """Raise RenderError if the text of a message lacks the name of one of its tool calls."""
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    if lost := next((name for name in names if name not in written), None):
        hint = "data.chat_template_from can name a template with tool calls"
        raise RenderError(f"the chat template leaves out the tool call {json.dumps(lost)} (turn {turn + 1}); {hint}")


def left_out(text: str, messages: Sequence[Message]) -> int:
    """Number of messages whose content, stripped of blanks, is not in the text of the conversation."""
    return sum(message["content"].strip() not in text for message in messages)


def _no_prefix(prefix: str, text: str, turn: int) -> str:
    """Error text with the first characters in which the prompt and the conversation differ."""
    same = len(os.path.commonprefix([prefix, text]))
    asked, written = (json.dumps(part[same : same + SHOWN], ensure_ascii=False) for part in (prefix, text))
    return f"{NOT_A_PREFIX} (turn {turn + 1}): prompt {asked}, prompt+answer {written}; {OTHER_TEMPLATE}"
