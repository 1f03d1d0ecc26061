"""Loading a tokenizer with the chat template of a run, without running code of the model's repository."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.template_probe import probed
from lowlevel.data.templates import DATE, ChatTemplate
from lowlevel.demo import DEMO_BASE
from lowlevel.errors import ConfigError, one_line

UNUSED_TEMPLATE = "chat_template.jinja is used; tokenizer_config.json has another chat template, which is not"


def load_chat_tokenizer(
    name: str, revision: str | None, chat_template_from: str | None, date: datetime.date = DATE
) -> ChatTokenizer:
    """Load a tokenizer and its chat template, without running code of the model's repository.

    The arguments are model.name, model.revision, data.chat_template_from and data.template_date. Raises ConfigError if
    it cannot be loaded, is not fast, has no eos token or no chat template, or has an unusable one (see `probed`).
    """
    tokenizer = _load_tokenizer(name, revision)
    loaded = chat_tokenizer(tokenizer, _template_text(tokenizer, name, chat_template_from), name, date)
    template = loaded.chat_template
    if note := _unused_template(Path(chat_template_from or name), template.text):
        template = replace(template, notes=(*template.notes, note))
    return replace(loaded, chat_template=template)


def _unused_template(folder: Path, used: str) -> str:
    """A note if tokenizer_config.json has another template than chat_template.jinja, which transformers prefers."""
    file = folder / "tokenizer_config.json"
    if not ((folder / "chat_template.jinja").is_file() and file.is_file()):
        return ""
    other = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return UNUSED_TEMPLATE if isinstance(other, str) and other.strip() != used.strip() else ""


def chat_tokenizer(tokenizer: Any, template: str, name: str = "tokenizer", date: datetime.date = DATE) -> ChatTokenizer:
    """Combine a loaded tokenizer with the text of a template; `name` is for errors. Raises ConfigError."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{name}: tokenizer has no eos token; completions would never end")
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = tuple(sorted({*added, *tokenizer.all_special_tokens}))
    chat_template = probed(ChatTemplate(template, dict(tokenizer.special_tokens_map), date), special)
    end = chat_template.end_of_turn
    bos = tokenizer.bos_token_id
    return ChatTokenizer(
        tokenizer=tokenizer,
        chat_template=chat_template,
        bos_id=bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None,
        eos_id=tokenizer.eos_token_id,
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id) if i is not None), 0),
        end_of_turn_id=tokenizer.convert_tokens_to_ids(end) if end else None,
        special_tokens=special,
    )


def _load_tokenizer(name: str, revision: str | None) -> Any:
    from tokenizers.models import BPE
    from transformers import AutoTokenizer

    path = str(DEMO_BASE) if name == "demo" else name
    if Path(path).is_dir() and not any(Path(path).glob("*token*")):
        raise ConfigError(f"{name} holds no tokenizer (tokenizer.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, use_fast=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError and others from hub and tokenizers
        raise ConfigError(f"{name}: no usable tokenizer: {one_line(error)}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"{name}: needs a fast tokenizer (tokenizer.json), which gives character offsets")
    core = tokenizer.backend_tokenizer.model
    if isinstance(core, BPE) and core.dropout:
        hint = "set model.dropout to null in its tokenizer.json"
        raise ConfigError(f"{name}: the tokenizer has BPE dropout, which draws other tokens each time; {hint}")
    return tokenizer


def _template_text(tokenizer: Any, name: str, chat_template_from: str | None) -> str:
    if chat_template_from is not None and chat_template_from.endswith(".jinja"):
        try:
            return Path(chat_template_from).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template_from {chat_template_from}: {one_line(error)}") from None
    source = tokenizer if chat_template_from is None else _load_tokenizer(chat_template_from, None)
    if source.chat_template is None:
        hint = "set data.chat_template_from to a model that has one, or to a .jinja file"
        raise ConfigError(f"{chat_template_from or name} has no chat template; {hint}")
    try:
        return str(source.get_chat_template())
    except ValueError:  # transformers 5.23: several templates in additional_chat_templates/ or a list, no default
        hint = "set data.chat_template_from to a .jinja file, or to a model with one template"
        raise ConfigError(
            f"{chat_template_from or name} has several chat templates and no default one; {hint}"
        ) from None
