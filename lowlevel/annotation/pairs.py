"""Two replies to a prompt, a judgement of them, and the preference rows that judgements give."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]  # as data/texts.py has it
CHOICES = ("left", "right", "tie", "bad")  # bad: both are


@dataclass(frozen=True)
class Pair:
    """A prompt and two replies: both of the only run, or the first of `runs[0]` and the second of `runs[1]`."""

    where: str
    prompt: list[Message]
    replies: tuple[str, str]
    ended: tuple[bool, bool]  # False: cut by max_new_tokens


@dataclass(frozen=True)
class Judgement:
    """What an annotator decided about pair number `pair`; reply number `left` stood on the left."""

    pair: int
    annotator: str
    left: int
    choice: str  # one of CHOICES
    time: str  # ISO 8601, UTC
    written: str | None = None  # a better reply

    @property
    def preferred(self) -> int | None:
        """The number of the better reply, 0 or 1; None for a tie and for both bad."""
        return {"left": self.left, "right": 1 - self.left}.get(self.choice)


def reply_on_left(seed: int, pair: int, annotator: str) -> int:
    """The number of the reply on the left, 0 or 1: drawn by a hash, anew for every annotator.

    So a side is independent of the quality of its reply and of the sides that the others saw: the left share of all
    judgements is binomial with 1/2 if sides have no influence.
    """
    return hashlib.sha256(f"{seed}:{pair}:{annotator}".encode()).digest()[0] & 1


def preference_rows(
    header: Mapping[str, Any], pairs: Sequence[Pair], judgements: Iterable[Judgement]
) -> Iterator[dict[str, Any]]:
    """Rows for `lowlevel dpo`: the better reply is chosen; a written one is chosen over both.

    A tie, or both bad, without a written reply gives no row.
    """
    for judged in judgements:
        pair = pairs[judged.pair]
        sides = [_side(header, pair, judged, number) for number in (0, 1)]
        if judged.written is not None:
            better: Any = (judged.written, {"written_by": judged.annotator})
            contests = [(better, sides[0]), (better, sides[1])]
        elif judged.preferred is not None:
            contests = [(sides[judged.preferred], sides[1 - judged.preferred])]
        else:
            continue
        for (chosen, from_), (rejected, against) in contests:
            yield {
                "prompt": pair.prompt,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "provenance": {
                    "pair": judged.pair,
                    "prompt": pair.where,
                    "annotator": judged.annotator,
                    "time": judged.time,
                    "choice": judged.choice,
                    "chosen": from_,
                    "rejected": against,
                    "sampling": header["sampling"],
                },
            }


def _side(header: Mapping[str, Any], pair: Pair, judged: Judgement, number: int) -> tuple[str, dict[str, Any]]:
    """Text and origin of a reply."""
    run = header["runs"][min(number, len(header["runs"]) - 1)]
    side = "left" if judged.left == number else "right"
    return pair.replies[number], {**run, "side": side, "ended": pair.ended[number]}
