"""The forms of a reply, and a strict parser that extracts the answer.

The styles are `polite` (short and friendly, the preferred one), `curt` (only the answer) and `rambling` (long).
A reply matches only if the *whole* text has one of these forms; a right number inside other text does not match.
"""

import random
import re

STYLES = ("polite", "curt", "rambling")
# Polite replies are the minority, so that after SFT the preferred style is rare even with greedy decoding, and DPO has
# something to change.
SFT_STYLE_WEIGHTS = (20, 50, 30)

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


def write_reply(answer: str, style: str, rng: random.Random) -> str:
    """Write `answer` in one of `STYLES`."""
    if style == "polite":
        return rng.choice(POLITE).format(answer)
    if style == "curt":
        return rng.choice(CURT).format(answer)
    if rng.random() < 0.5:
        return f"{rng.choice(OPENERS)} {rng.choice(MIDDLES)} I believe it is {answer}."
    return f"{rng.choice(OPENERS)} I believe it is {answer}, {rng.choice(ENDINGS)}."


def draw_style(rng: random.Random) -> str:
    """Draw the style of an SFT reply, independent of the prompt."""
    return rng.choices(STYLES, SFT_STYLE_WEIGHTS)[0]


def parse_reply(reply: str) -> tuple[str, str] | None:
    """Return (style, answer) if the whole reply has one of the known forms, else None."""
    found = ((style, pattern.fullmatch(reply.strip())) for style, patterns in _PATTERNS.items() for pattern in patterns)
    return next(((style, match[1]) for style, match in found if match), None)


def preferred_style(reply: str) -> bool:
    """Whether a reply is short and polite, with any answer."""
    parsed = parse_reply(reply)
    return parsed is not None and parsed[0] == "polite"
