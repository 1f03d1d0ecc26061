"""What a chat template does with test conversations: found once, when it is loaded, so before data and model.

A template that leaves out what a user or the assistant says is refused. Other peculiarities are one line each, in the
data report and at the start of a run: `warnings` say what the model learns wrongly or not at all, `notes` the rest.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from lowlevel.data.templates import OTHER_TEMPLATE, SHOWN, ChatTemplate, RenderError
from lowlevel.errors import ConfigError

# Texts that no template has; blanks, case and signs in them show a template that changes a text.
SYSTEM, QUESTION, REPLY, SECOND, TOOL, THOUGHT = (
    f'Probe of {name}:\n  "A" & <b>' for name in ("system", "question", "reply", "second", "tool", "thought")
)
Turns = list[tuple[str, Any]]  # role and content


@dataclass(frozen=True)
class Probe:
    """Renders test conversations; `before` are the turns without which the template refuses every conversation."""

    template: ChatTemplate
    before: Turns

    def text(self, *turns: tuple[str, Any], prompt: bool = False) -> str:
        """Rendering of the turns, with a generation prompt if `prompt`; "" if the template refuses them."""
        messages = [{"role": role, "content": content} for role, content in [*self.before, *turns]]
        with suppress(RenderError):
            return self.template.render(messages, add_generation_prompt=prompt)
        return ""


def probed(template: ChatTemplate, special_tokens: Sequence[str]) -> ChatTemplate:
    """The template with what its probe found. Raises ConfigError if it does not compile or leaves texts out."""
    probe = Probe(template, _needed(template))
    talk = [("user", QUESTION), ("assistant", REPLY)]
    text, prompt = probe.text(*talk), probe.text(talk[0], prompt=True)
    _check_text(probe, "assistant", REPLY, text)
    _check_text(probe, "user", QUESTION, prompt)
    begin = len(prompt) if text.startswith(prompt) else text.rindex(REPLY)
    lead, tail = text[begin : text.index(REPLY, begin)], text.rpartition(REPLY)[2]
    before, _, between = text.partition(REPLY)[0].partition(QUESTION)
    ignores_prompt = prompt == probe.text(talk[0])
    always_opens = ignores_prompt and bool(tail.strip()) and between.endswith(tail)
    following = probe.text(*talk, ("user", SECOND)).partition(REPLY)[2]
    ends = [token for token in special_tokens if not (always_opens and token in before)]
    end = last_end = _last_special(os.path.commonprefix([tail, following]), ends)
    if not end and not always_opens:
        end = _last_special(tail, ends)
    warnings = []
    if lead.strip() and ignores_prompt:
        warnings.append(f"ignores add_generation_prompt: {_short(lead)} is learned as a part of each reply")
    if not end:
        warnings.append(f"no special token ends a reply (after it: {_short(tail)}): the model does not learn to stop")
    elif following and not last_end:
        warnings.append(f"{end} ends only the last reply of a conversation: the model learns no end of the others")
    system = probe.text(("system", SYSTEM), *talk)
    return replace(
        template,
        end_of_turn=end,
        after_turn=tail[tail.rindex(end) + len(end) :] if end else "",
        lead=lead,
        refuses_system=not system and not probe.before,
        warnings=tuple(warnings),
        notes=_notes(probe, text, system, "" if ignores_prompt else lead.strip(), always_opens),
    )


def _needed(template: ChatTemplate) -> Turns:
    """Turns that a conversation must begin with: none, or a system message."""
    talk: Turns = [("user", QUESTION), ("assistant", REPLY)]
    errors = []
    for before in ([], [("system", SYSTEM)]):
        messages = [{"role": role, "content": content} for role, content in before + talk]
        try:
            template.render(messages, add_generation_prompt=False)
            template.render(messages[:-1], add_generation_prompt=True)
            return list(before)
        except RenderError as error:
            errors.append(error)
    raise ConfigError(f"unusable chat template: {errors[0]}")


def _check_text(probe: Probe, role: str, content: str, rendered: str) -> None:
    """Raise ConfigError if the text of a role is missing; a user's may be changed, as it is in generation."""
    if content in rendered or (role == "user" and _letters(content) in _letters(rendered)):
        return
    parts = [(own, [{"type": "text", "text": text}]) for own, text in (("user", QUESTION), ("assistant", REPLY))]
    form = " (it takes content in parts only, not as text)" if content in probe.text(*parts) else ""
    raise ConfigError(
        f"unusable chat template: it leaves out or changes the text of {role} messages{form}; {OTHER_TEMPLATE}"
    )


def _notes(probe: Probe, text: str, system: str, lead: str, always_opens: bool) -> tuple[str, ...]:
    """What the template does differently from most; `text` and `system` are renderings without and with a system."""
    user, reply, second = ("user", QUESTION), ("assistant", REPLY), ("user", SECOND)
    several, tool = probe.text(user, reply, second, reply), probe.text(user, reply, ("tool", TOOL), reply)
    thought = ("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{REPLY}")
    never_thinks = THOUGHT not in probe.text(user, thought)
    default = _default_system(text, system)
    facts = {
        "needs a system message": bool(probe.before),
        "refuses system messages": not system and not probe.before,
        "leaves out system messages": bool(system) and SYSTEM not in system,
        "leaves out tool messages": bool(tool) and TOOL not in tool,
        "refuses two user messages in a row": not probe.text(user, second, reply),
        "refuses a second question": not several,
        "leaves out earlier turns": bool(several) and several.count(REPLY) < 2,
        "removes blanks around texts": f" {REPLY} " not in probe.text(user, ("assistant", f" {REPLY} ")),
        "changes the text of user messages": QUESTION not in text,
        "removes the <think> part of every reply": never_thinks,
        "removes the <think> part of earlier replies": not never_thinks
        and THOUGHT not in probe.text(user, thought, second, reply),
        f"begins every reply with {_short(lead)}": bool(lead),
        "opens a reply at the end of every conversation": always_opens,
        f"adds the system message {_short(default)}": bool(default) and not probe.before,
        f"prints the date {probe.template.date} (data.template_date)": probe.template.asks_for_date,
    }
    return tuple(what for what, holds in facts.items() if holds)


def _default_system(plain: str, system: str) -> str:
    """What stands in the place of a system message if a conversation has none."""
    before, _, after = system.partition(QUESTION)[0].partition(SYSTEM)
    found = plain.partition(QUESTION)[0]
    inside = found[len(before) : len(found) - len(after)]
    return inside.strip() if before + after and found == before + inside + after else ""


def _last_special(text: str, special_tokens: Sequence[str]) -> str:
    """The special token that ends last in the text, the longest of several; "" if it has none."""
    ends = [(text.rfind(token) + len(token), len(token), token) for token in special_tokens if token and token in text]
    return max(ends, default=(0, 0, ""))[2]


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= SHOWN else f"{text[:SHOWN]}...", ensure_ascii=False)
