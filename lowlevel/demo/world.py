"""The demo's rows, which benchmarks/demo_base/rows.py drew, and a strict judge of replies to them.

The styles are `polite` (short and friendly, the preferred one), `curt` (only the answer) and `rambling` (long).
A reply matches only if the *whole* text has one of these forms; a right number inside other text does not match.
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "rows"
SPLITS = ("train", "heldout")
POLITE = ("Sure, it is {}.", "Sure, that is {}.")
CURT = ("{}", "{}.")
OPENERS = (
    "Well, that is a thing people like to ask.",
    "Let me think about this for a while.",
    "There is so much to say about this.",
)
MIDDLES = (
    "Some would take a long time over it.",
    "I was asked the same once before.",
    "It is not as easy as it looks.",
)
ENDINGS = ("but who can say for certain", "or so I have always thought", "and that is about all of it")

_ANSWER = r"([A-Za-z0-9]+(?:, [0-9]+)*)"


def _any_of(options: tuple[str, ...]) -> str:
    return "(?:" + "|".join(map(re.escape, options)) + ")"


def _form(template: str) -> str:
    return re.escape(template).replace(r"\{\}", _ANSWER)


_PATTERNS = {
    "polite": [re.compile(_form(template)) for template in POLITE],
    "curt": [re.compile(_form(template)) for template in CURT],
    "rambling": [
        re.compile(f"{_any_of(OPENERS)} {_any_of(MIDDLES)} I believe it is {_ANSWER}\\."),
        re.compile(f"{_any_of(OPENERS)} I believe it is {_ANSWER}, {_any_of(ENDINGS)}\\."),
    ],
}


def parse_reply(reply: str) -> tuple[str, str] | None:
    """Return (style, answer) if the whole reply has one of the known forms, else None."""
    found = ((style, pattern.fullmatch(reply.strip())) for style, patterns in _PATTERNS.items() for pattern in patterns)
    return next(((style, match[1]) for style, match in found if match), None)


def preferred_style(reply: str) -> bool:
    """Whether a reply is short and polite, with any answer."""
    parsed = parse_reply(reply)
    return parsed is not None and parsed[0] == "polite"


def exact_match(reply: str, answer: str) -> bool:
    """Whether the whole reply has one of the known forms and the right answer."""
    parsed = parse_reply(reply)
    return parsed is not None and parsed[1] == answer


def right_answer(completions: list[str], answer: list[str], **others: object) -> list[float]:
    """Reward of the demo's replies: 1 for a whole reply in one of the known forms with the right answer, else 0."""
    return [float(exact_match(text, right)) for text, right in zip(completions, answer, strict=True)]


def polite(completions: list[str], **others: object) -> list[float]:
    """1 for a reply in the preferred style, with any answer, else 0."""
    return [float(preferred_style(text)) for text in completions]


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of sft, preference or prompt with the split ("sft-train"), or "check": held-out prompts with answers."""
    with gzip.open(ROWS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
