"""A chat template: messages to text, and which characters of the text are the assistant's.

Those characters come from the template's {% generation %} markers, or else from rendering the turns one by one.
A template is code of somebody else, run in the Jinja sandbox of transformers: it reaches no attribute that leads out of
its values, and no range() longer than 100,000. Loops within loops are not bounded: such a template can be slow.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowlevel.errors import ConfigError, DataError, one_line

Message = Mapping[str, str]
Span = tuple[int, int]
NOT_A_PREFIX = "prompt tokens are not a prefix of prompt+answer tokens"
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "Reply"
SHOWN = 40  # characters of a rendering in an error
DATE_CODES = ("%-d", "%-m", *(f"%{letter}" for letter in "YymdBbAajHMSIpF"))  # of strftime, as templates use them
DATE = datetime.date(2024, 7, 26)  # what Llama 3.1's template takes where it is told none


class RenderError(DataError):
    """A conversation that the template refuses, or renders so that the prompt is not the beginning of the whole."""


@dataclass(frozen=True)
class Rendering:
    """Text of a conversation.

    Attributes:
        replies: character range of each reply that stands in the text as the model is asked for it and would write it,
            end-of-turn token included.
        changed: other replies. Some templates write a reply otherwise once more turns follow (Qwen 3 leaves out its
            <think> part): learned from there it would not be what the model is to write, so it is context alone.
        prompt: text that generation starts from for the first of `replies`; None where that is not known.
    """

    text: str
    replies: list[Span]
    changed: int
    prompt: str | None


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the special tokens that it may name.

    Attributes:
        text: Jinja source.
        variables: names that the template sees, such as eos_token.
        date: what a template that asks for today's date is told, so that the same rows give the same tokens tomorrow.
        end_of_turn: special token that ends a reply ("" where the template writes none).
        after_turn: what the template writes behind it where nothing follows: a newline, in Phi 3 also another token.
    """

    text: str
    variables: Mapping[str, str]
    date: datetime.date = DATE
    end_of_turn: str = ""
    after_turn: str = ""

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
        """Whether the template itself marks what the assistant wrote."""
        return MARKERS.search(self.text) is not None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Text of a conversation, with the opening of a reply if `add_generation_prompt`. Raises RenderError."""
        return self._render(messages, add_generation_prompt)[0]

    def text_and_replies(self, messages: Sequence[Message]) -> Rendering:
        """Text of a conversation, and where its replies are.

        Raises:
            RenderError: the template refuses the conversation, or the prompt of its last reply is not a prefix of it.
        """
        text, marked = self._render(messages, False)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if self.has_markers:
            replies = [(start, self._reply_end(text, end)) for start, end in marked if start < end]
            known = len(replies) == len(turns) > 0  # else nothing says which turn the first one is
            return Rendering(text, replies, 0, self._asked(messages[: turns[0]]) if known else None)
        spans = [self._reply(messages, turn, text) for turn in turns]
        replies = [span for span in spans if span is not None]
        return Rendering(text, replies, spans.count(None), text[: replies[0][0]] if replies else None)

    def text_and_cut(self, prompt: Sequence[Message], reply: str, supervise: str) -> tuple[str, int]:
        """Text of a prompt with one reply, and the character where the reply begins.

        With supervise "assistant" the text ends with the end-of-turn token, with "all" as the template ends it.
        """
        prefix = self.render(prompt, add_generation_prompt=True)
        text = self.render([*prompt, {"role": "assistant", "content": reply}], add_generation_prompt=False)
        if not text.startswith(prefix):
            raise RenderError(_no_prefix(prefix, text, len(prompt)))
        return text if supervise == "all" else text[: self._reply_end(text, len(text))], len(prefix)

    def _asked(self, prompt: Sequence[Message]) -> str | None:
        try:
            return self.render(prompt, add_generation_prompt=True)
        except RenderError:
            return None

    def _reply(self, messages: Sequence[Message], turn: int, text: str) -> Span | None:
        """Where a reply is in the text; None where the turns after it change it, or what it answers."""
        prefix = self.render(messages[:turn], add_generation_prompt=True)
        last = turn == len(messages) - 1
        through = text if last else self.render(messages[: turn + 1], add_generation_prompt=False)
        if through.startswith(prefix):
            end = self._reply_end(through, len(through))
            if text.startswith(through[:end]):
                return len(prefix), self._reply_end(text, end) if end == len(through) else end
        if last:
            raise RenderError(_no_prefix(prefix, text, turn))
        return None

    def _reply_end(self, text: str, end: int) -> int:
        """Where the end-of-turn token ends. `end` may lie behind it, or before it (markers around the content)."""
        if self.end_of_turn and text.endswith(self.end_of_turn + self.after_turn, 0, end):
            return end - len(self.after_turn)
        if self.end_of_turn and text.startswith(self.end_of_turn, end):
            return end + len(self.end_of_turn)
        return end

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        options: dict[str, Any] = {
            **self.variables,
            "chat_template": (_told(self.date) if self.asks_for_date else "") + self.text,
            "return_assistant_tokens_mask": self.has_markers,
            "add_generation_prompt": add_generation_prompt,
        }
        # annotated as returning str in transformers 5.23, but returns (texts, marked ranges)
        render: Any = chat_template_utils.render_jinja_template
        try:
            texts, marked = render([[dict(message) for message in messages]], **options)
        except Exception as error:  # foreign code can raise anything
            raise RenderError(f"the chat template refuses the row: {one_line(error)}") from None
        return texts[0], list(marked[0]) if marked else []


def _told(date: datetime.date) -> str:
    """Jinja source that redefines `strftime_now`, which transformers offers to templates: with a date that stays."""
    directives = "".join(f" | replace('{code}', '{date.strftime(code)}')" for code in DATE_CODES)
    return "{%- macro strftime_now(format) -%}{{ format" + directives + " }}{%- endmacro -%}{{ '' }}"


def left_out(text: str, messages: Sequence[Message]) -> int:
    """How many messages the text of a conversation does not hold as they are, but for blanks around them."""
    return sum(message["content"].strip() not in text for message in messages)


def _no_prefix(prefix: str, text: str, turn: int) -> str:
    """Why a reply cannot be learned where it stands: the first characters in which its prompt is not the whole's."""
    same = len(os.path.commonprefix([prefix, text]))
    asked, written = (json.dumps(part[same : same + SHOWN], ensure_ascii=False) for part in (prefix, text))
    hint = "data.chat_template_from can name a template that writes both alike"
    return f"{NOT_A_PREFIX} (turn {turn + 1}): asked for the reply it has {asked}, with it {written}; {hint}"


def with_end_of_turn(template: ChatTemplate, special_tokens: Sequence[str]) -> ChatTemplate:
    """Find out how the template ends a reply: the last special token behind the text of a probe.

    What it writes there in the middle of a conversation, too, comes first: Phi 3 ends a reply with <|end|>, and the
    whole with another token.

    Raises:
        ConfigError: the template does not compile, or refuses the plainest conversation.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        text = template.render(messages, add_generation_prompt=False)
    except RenderError as error:
        raise ConfigError(f"unusable chat template: {error}") from None
    tail = text.rpartition(PROBE)[2]
    try:
        more = template.render([*messages, messages[0]], add_generation_prompt=False).partition(PROBE)[2]
    except RenderError:
        more = ""
    for part in (os.path.commonprefix([tail, more]), tail):
        found = sorted((token for token in special_tokens if token and token in part), key=len)
        ends = {part.rfind(token) + len(token): token for token in found}
        if ends:
            return replace(template, end_of_turn=ends[max(ends)], after_turn=tail[max(ends) :])
    return template
