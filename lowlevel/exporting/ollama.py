"""An Ollama Modelfile with the chat template that was trained, as a Go template.

Nothing is looked up by the model's name. The template is rendered with marked messages, the text around each role is
read off, and these pieces must give back the template's own text for longer conversations; if not, it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.templates import Message, RenderError
from lowlevel.errors import ConfigError
from lowlevel.exporting.gguf_model import writes_bos

MARKS = {"system": "§S§", "user": "§U§", "assistant": "§A§"}
SECOND = "§V§"


@dataclass(frozen=True)
class Pieces:
    """The texts before and after a message of each role, and what begins a reply."""

    around: dict[str, tuple[str, str]]  # "system" is missing if the template refuses it
    reply: str
    bos: str  # at the start, or empty
    system: str | None  # that the template writes if there is no system message

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for the next reply."""
        first = messages[0]["role"] == "system"
        implied = [] if first or self.system is None else [{"role": "system", "content": self.system}]
        parts = (self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in [*implied, *messages])
        return self.bos + "".join(parts) + self.reply


def read_pieces(tokenizer: ChatTokenizer) -> Pieces:
    """Read the pieces off a chat template. Raises ConfigError if it is not made of such pieces."""

    def render(*roles: str, reply: bool = False) -> str:
        return tokenizer.chat_template.render(_messages(*roles), add_generation_prompt=reply)

    try:
        before_user, after_user = render("user").split(MARKS["user"])
        reply = render("user", reply=True).removeprefix(render("user"))
        answered = render("user", "assistant").removeprefix(before_user + MARKS["user"] + after_user)
        before_reply, after_reply = answered.split(MARKS["assistant"])
        again = render("user", "assistant", "user").removeprefix(render("user", "assistant"))
        user = again.split(SECOND)[0]
        around = {"user": (user, after_user), "assistant": (before_reply, after_reply)}
        start = before_user.removesuffix(user)
        bos = str(tokenizer.tokenizer.bos_token) if writes_bos(tokenizer) else ""  # llama.cpp adds it by itself
        system, implied = _system(tokenizer, user, bos), start.removeprefix(bos)
        if system:
            around["system"] = system
        if implied and not (system and implied.startswith(system[0]) and implied.endswith(system[1])):
            raise ValueError(implied)
        text = implied.removeprefix(system[0]).removesuffix(system[1]) if system and implied else None
        pieces = Pieces(around, reply, bos, text)
        checked = [("user", "assistant", "user"), ("system", "user", "assistant", "user", "assistant", "user")]
        for roles in checked[: 1 + ("system" in around)]:
            if pieces.render(_messages(*roles)) != render(*roles, reply=True):
                raise ValueError(roles)
    except (ValueError, RenderError):
        raise ConfigError(
            "--to ollama: this chat template is more than a text before and after each message, which a Modelfile "
            "cannot say: use --to gguf, which holds the template itself"
        ) from None
    return pieces


def modelfile(tokenizer: ChatTokenizer, model: str) -> str:
    """The text of a Modelfile for the GGUF file `model` beside it. Raises ConfigError as `read_pieces`."""
    pieces = read_pieces(tokenizer)
    texts = [pieces.reply, pieces.system or "", *(text for pair in pieces.around.values() for text in pair)]
    if any("{{" in text or '"""' in text for text in texts):
        raise ConfigError('--to ollama: the chat template\'s text holds {{ or """, which a Modelfile cannot')
    roles = " else ".join(
        f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
        for role, (before, after) in pieces.around.items()
    ).replace("{{ end }} else {{ if", "{{ else if")
    stops = [str(tokenizer.tokenizer.convert_ids_to_tokens(number)) for number in tokenizer.stop_ids]
    lines = [
        f"FROM ./{model}",
        f'TEMPLATE """{{{{ range .Messages }}}}{roles}{{{{ end }}}}{pieces.reply}"""',
        *([] if pieces.system is None else [f'SYSTEM """{pieces.system}"""']),
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
    ]
    return "\n".join(lines) + "\n"


def _system(tokenizer: ChatTokenizer, user: str, bos: str) -> tuple[str, str] | None:
    """The texts around a system message; None if the template refuses one."""
    try:
        text = tokenizer.chat_template.render(_messages("system", "user"), add_generation_prompt=False)
    except RenderError:
        return None
    before, rest = text.split(MARKS["system"])
    between = rest.split(MARKS["user"])[0]
    if not between.endswith(user):
        raise ValueError(between)
    return before.removeprefix(bos), between.removesuffix(user)


def _messages(*roles: str) -> list[Message]:
    """Messages whose contents are marks; a second user's has a mark of its own."""
    made: list[Message] = []
    for role in roles:
        mark = SECOND if role == "user" and any(m["role"] == "user" for m in made) else MARKS[role]
        made.append({"role": role, "content": mark})
    return made
