"""Plain text for pre-training the demo's base model: every skill and fact of the world, never in chat format.

There are four kinds of documents: statements, profiles of people, question-and-answer pages in several notations, and
prose. Both splits of the world occur: a "held-out" question is never asked in fine-tuning, but the base has read its
answer.
"""

import random

from benchmarks.demo_base.skills import ATTRIBUTES, Ask, draw, draw_followup, fact, world_facts
from lowlevel.demo import world

# (before the question, between question and answer, after the answer)
_NOTATIONS = (
    ("Q: ", "\nA: ", "\n"),
    ("Question: ", " Answer: ", "\n"),
    ("Teacher: ", "\nPupil: ", "\n"),
    ("", "\n", "\n"),
    ("* ", " -> ", "\n"),
    ('"', '" - "', '"\n'),
    ("One asks: ", "\nOne hears: ", "\n\n"),
)
_PHRASES = ("{}", "{}", "{}.", "It is {}.", "it is {}.", "I believe it is {}.")
_PROSE = (
    *world.OPENERS,
    *world.MIDDLES,
    *(ending[0].upper() + ending[1:] + "." for ending in world.ENDINGS),
    "Of course, people like to help.",
    "A user asks, and the assistant answers.",
    "The system is small and the user is happy.",
    "Sure, the sun is out today.",
    "You answer questions about a small world.",
    "An assistant is happy to help the user of a system.",
    "The people of this small world ask questions all day.",
    "Who can say for certain what the day will bring?",
    "Happy days: so it was, so it is.",
)


def _page(rng: random.Random) -> str:
    # "<|page|>" trains the embeddings of the chat markers' pieces without showing a chat.
    return "<|page|>\n" if rng.random() < 0.3 else ""


def _statements(rng: random.Random) -> str:
    lines = [rng.choice(draw(rng).statements) for _ in range(rng.randint(2, 8))]
    return rng.choice(("\n", "\n", " ")).join(lines)


def _profile(rng: random.Random) -> str:
    name = rng.choice(list(world_facts()))
    attributes = rng.sample(ATTRIBUTES, rng.randint(2, 4))
    lines = [rng.choice(fact(name, attribute).statements) for attribute in attributes]
    return rng.choice(("\n", " ")).join(lines)


def _exchanges(rng: random.Random) -> list[tuple[str, Ask]]:
    """Draw questions with their wording; a follow-up comes directly after its question."""
    first = draw(rng)
    exchanges = [(rng.choice(first.wordings), first)]
    if rng.random() < 0.4:
        second = draw_followup(first, rng)
        exchanges.append((rng.choice(second.followups), second))
    return exchanges


def _questions(rng: random.Random) -> str:
    before, between, after = rng.choice(_NOTATIONS)
    phrases = rng.choices(_PHRASES, k=rng.choice((1, 3)))
    pairs = [pair for _ in range(rng.randint(1, 4)) for pair in _exchanges(rng)]
    return "".join(
        f"{before}{question}{between}{rng.choice(phrases).format(ask.answer)}{after}" for question, ask in pairs
    ).rstrip("\n")


def _prose(rng: random.Random) -> str:
    return " ".join(rng.sample(_PROSE, rng.randint(2, 4)))


def pretraining_text(seed: int, n: int) -> list[str]:
    """Return n documents of plain text without end-of-text marks, determined by the seed."""
    rng = random.Random(f"pretraining {seed}")
    kinds = rng.choices((_statements, _profile, _questions, _prose), (30, 10, 55, 5), k=n)
    return [_page(rng) + kind(rng) for kind in kinds]
