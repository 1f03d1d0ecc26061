"""Tokens as visible text: signs for whitespace, code points of control characters, other bytes as <0x..>.

" the" is ·the      a newline is ⏎      a tab is ⇥      half an emoji is <0xF0><0x9F>      </s> is </s>
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from lowlevel.data.rendering import ChatTokenizer

SPACE, NEWLINE = "·", "⏎"
VISIBLE = {" ": SPACE, "\n": NEWLINE, "\t": "⇥", "\r": "␍"}
HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")  # categories without a visible glyph
MARKS = ("Mc", "Me", "Mn")  # combining: they would be drawn on the character before the token
METASPACE = "▁"  # SentencePiece's space


@dataclass(frozen=True)
class TokenPieces:
    """Converts token ids to the texts that are shown."""

    tokenizer: ChatTokenizer

    def text(self, token: int) -> str:
        """The text of one token: never empty, without line breaks and control characters."""
        if token in self._special:
            return self._special[token]
        if token in self._added:
            return visible(self._added[token])
        piece: Any = self.tokenizer.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an embedding may have more rows than the tokenizer has tokens
            return f"<id={token}>"
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece's byte
            return piece
        return visible(_decoded(piece) if self._byte_level else piece.replace(METASPACE, " "))

    def texts(self, tokens: Iterable[int]) -> list[str]:
        """`text` of each token."""
        return [self.text(int(token)) for token in tokens]

    def decode(self, tokens: Iterable[int]) -> str:
        """The plain text of many tokens, special tokens included."""
        return self.tokenizer.decode([int(token) for token in tokens])

    @cached_property
    def _added(self) -> dict[int, str]:
        return {number: token.content for number, token in self.tokenizer.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _special(self) -> dict[int, str]:
        return {number: text for number, text in self._added.items() if text in self.tokenizer.special_tokens}

    @cached_property
    def _byte_level(self) -> bool:
        """Whether pieces encode bytes, as GPT-2's (Ġthe), and not text, as SentencePiece's (▁the)."""
        fast: Any = self.tokenizer.tokenizer
        decoder = json.loads(fast.backend_tokenizer.to_str())["decoder"] or {}
        return "ByteLevel" in {step["type"] for step in [decoder, *decoder.get("decoders", ())] if step}


def visible(text: str) -> str:
    """Text with every character visible, on one line."""
    shown = [VISIBLE.get(char) or _seen(char) for char in text]
    if text and unicodedata.category(text[0]) in MARKS:
        shown.insert(0, "◌")
    return "".join(shown) or "∅"


def breaks_line(shown: str) -> bool:
    """Whether this token ends a line."""
    return NEWLINE in shown or shown == "<0x0A>"


def _seen(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # Python's surrogateescape: a byte that is not valid UTF-8
        return f"<0x{ord(char) - 0xDC00:02X}>"
    return f"<U+{ord(char):04X}>" if unicodedata.category(char) in HIDDEN else char


def _decoded(piece: str) -> str:
    """The text of a byte-level piece; bytes that are not valid UTF-8 (half a character) become surrogates."""
    known = [BYTES.get(char) for char in piece]
    if None in known:  # an added token, stored as text
        return piece
    raw = bytes(byte for byte in known if byte is not None)
    return raw.decode("utf-8", errors="surrogateescape")


# GPT-2's characters for bytes: printable Latin-1 maps to itself, all others to code points from 256 on.
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
