"""Removes secrets from all output: console, errors, tracebacks, status files.

Secrets are: the value of an environment variable with a name such as HF_TOKEN or WANDB_API_KEY, a token of the Hugging
Face hub, and the user and password in a URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TextIO

REDACTED = "[redacted]"
SHORTEST = 6  # characters; shorter values such as "1" or "true" occur in normal text
_TELLING = re.compile(r"(TOKEN|_KEY|_SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_IN_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,20}://)[^\s/@'\"<>]{1,512}@")


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of the variables with the name of a secret, longest first, because one may contain another."""
    values = {value.strip() for name, value in environment.items() if _TELLING.search(name)}
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


def redact(text: str) -> str:
    """The text with every secret replaced."""
    for secret in secrets_of(os.environ):
        text = text.replace(secret, REDACTED)
    text = _HUB_TOKEN.sub(REDACTED, text)
    return _IN_URL.sub(rf"\g<scheme>{REDACTED}@", text)


def holds_secret(text: str) -> bool:
    """Whether `redact` would change the text."""
    return redact(text) != text


class RedactedStream:
    """A text stream that redacts everything written to it; other methods are those of the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the redacted text. Returns the length of the original text, as print() and rich expect."""
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
