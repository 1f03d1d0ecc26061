"""What data.max_length cuts, and the lengths that would keep more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lowlevel.config.data import DataConfig
from lowlevel.data.rendering import Encoded, EncodedPair

SHARES = (90, 95, 99)  # percent of the tokens
# Tokens of a row before truncation: prompt, chosen, rejected, and where the first reply of a conversation begins (a
# pair: -1). A conversation is all prompt.
Sizes = tuple[int, int, int, int]


@dataclass(frozen=True)
class Truncation:
    """Effect of max_length on the rows of a split, those included that it drops. Tokens: prompts and completions."""

    max_length: int
    rows: int
    rows_cut: int  # that lose a token
    rows_dropped: int  # of these, the ones that lose all: no reply begins within max_length
    tokens: int  # with no limit but max_prompt_length
    tokens_cut: int
    keeping: dict[str, int] = field(default_factory=dict)  # percent of the tokens -> smallest max_length that keeps it
    limit: int = 0  # the model's

    def __str__(self) -> str:
        dropped = f" and drops {self.rows_dropped:,} of these" if self.rows_dropped else ""
        cut = f"cuts {self.rows_cut:,} of {self.rows:,} rows{dropped} ({self.tokens_cut / self.tokens:.1%} of tokens)"
        largest = {length: share for share, length in self.keeping.items()}  # of shares that one length keeps
        lengths = ", ".join(f"{length:,} keeps {share} %" for length, share in largest.items())
        most = f" (the model takes at most {self.limit:,})" if max(self.keeping.values()) > self.limit else ""
        return f"max_length {self.max_length:,} {cut}; {lengths}{most}"


def sizes_of(encoded: Encoded | EncodedPair, data: DataConfig) -> Sizes:
    """The sizes of an encoded row."""
    if isinstance(encoded, EncodedPair):
        return len(encoded.prompt_ids), len(encoded.chosen_ids), len(encoded.rejected_ids), -1
    replies = encoded.replies if data.supervise == "assistant" else []
    return len(encoded.input_ids), 0, 0, replies[0][0] if replies else -1


def truncation(rows: Sequence[Sizes], data: DataConfig, limit: int) -> Truncation:
    """What data.max_length does to rows of these sizes; `limit` is the longest sequence of the model."""
    sizes = np.array(rows, np.int64).T
    longest = int((sizes[0] + sizes[1:3].max(0)).max())
    whole = kept_tokens(sizes, longest, data.max_prompt_length)
    kept = kept_tokens(sizes, data.max_length, data.max_prompt_length)
    total = int(whole.sum())

    def smallest(share: int) -> int:
        low, high = 1, longest  # kept_tokens never falls with the length
        while low < high:
            middle = (low + high) // 2
            enough = 100 * int(kept_tokens(sizes, middle, data.max_prompt_length).sum()) >= share * total
            low, high = (low, middle) if enough else (middle + 1, high)
        return low

    return Truncation(
        max_length=data.max_length,
        rows=len(rows),
        rows_cut=int((kept < whole).sum()),
        rows_dropped=int((kept == 0).sum()),
        tokens=total,
        tokens_cut=total - int(kept.sum()),
        keeping={str(share): smallest(share) for share in SHARES},
        limit=limit,
    )


def kept_tokens(sizes: np.ndarray, max_length: int, max_prompt: int | None) -> np.ndarray:
    """Tokens (N,) that truncation leaves of rows `sizes` (4, N), by the rule of `building.truncate_pair`."""
    prompt, chosen, rejected, reply = sizes
    claimed = np.minimum(np.maximum(chosen, rejected), max_length // 2)
    prompt = np.minimum(prompt, np.minimum(max_length - claimed, max_prompt or max_length))
    room = max_length - prompt
    kept: np.ndarray = prompt + np.minimum(chosen, room) + np.minimum(rejected, room)
    return np.where(reply < max_length, kept, 0)
