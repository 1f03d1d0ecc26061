"""The tasks of the small world: each skill draws a question whose answer can be checked.

An `Ask` is a question in no particular format. Its `key` names the fact in a canonical form: 3 + 4 and 4 + 3 have the
same key, and so have "opposite of hot" and "opposite of cold". Only the key decides whether the question is in the
training or the held-out split, so a held-out answer never occurs as the reverse of a training question.
"""

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

HELDOUT_SHARE = 0.4
ATTRIBUTES = ("town", "pet", "door", "food")

_NAMES = (
    "Mira Tobi Lena Oskar Pia Juno Emil Greta Bruno Nela Timo Rosa Viktor Alma Henrik Cleo Felix Ida Jonas Kira Ludo "
    "Maren Nils Olga Paul Quinn Rafa Selma Theo Ursa Vera Wim Xenia Yara Zeno Anton Berta Carl Dora Egon"
).split()
_VALUES = {
    "town": "Tolba Merin Askov Dunfer Pelham Rosk Vintel Kalmar Ostby Lindo".split(),
    "pet": "cat dog owl fox horse goat parrot turtle".split(),
    "door": "red blue green yellow black white pink brown".split(),
    "food": "bread soup rice cake plums beans cheese honey".split(),
}
_OPPOSITES = (
    "hot cold big small fast slow up down day night open closed full empty hard soft high low long short new old "
    "wet dry loud quiet light dark early late near far rich poor strong weak happy sad thick thin true false left "
    "right clean dirty deep shallow first last inside outside sweet sour wide narrow good bad heavy weightless"
).split()
_OPPOSITE_PAIRS = tuple(zip(_OPPOSITES[::2], _OPPOSITES[1::2], strict=True))
NOUNS = "apple sun tree boat stone lamp river cloud spoon drum kite leaf".split()


@dataclass(frozen=True)
class Ask:
    """One question of the world."""

    task: str
    key: str
    answer: str
    wordings: tuple[str, ...]
    followups: tuple[str, ...]  # short forms that need the question before them
    statements: tuple[str, ...]  # the same fact as plain text for pre-training
    wrong: tuple[str, ...]  # plausible wrong answers
    subject: str = ""


def split_of(key: str) -> str:
    """Return "train" or "heldout" by a hash of the key: the same in every process and for every seed."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "heldout" if share < HELDOUT_SHARE else "train"


@functools.cache
def world_facts() -> dict[str, dict[str, str]]:
    """Return the invented facts, {name: {attribute: value}}, independent of any seed."""
    rng = random.Random(20240)
    return {name: {attribute: rng.choice(_VALUES[attribute]) for attribute in ATTRIBUTES} for name in _NAMES}


def _near(value: int) -> tuple[str, ...]:
    return tuple(str(value + step) for step in (-10, -2, -1, 1, 2, 10) if value + step >= 0)


def add(a: int, b: int) -> Ask:
    """Ask for a + b."""
    low, high = sorted((a, b))
    return Ask("add", f"add {low} {high}", str(a + b),
               (f"What is {a} + {b}?", f"How much is {a} plus {b}?", f"Add {a} and {b}."),
               (f"And {a} + {b}?", f"And {a} plus {b}?"),
               (f"{a} + {b} = {a + b}", f"{a} plus {b} is {a + b}."), _near(a + b))  # fmt: skip


def subtract(a: int, b: int) -> Ask:
    """Ask for a - b, with a >= b."""
    return Ask("subtract", f"subtract {a} {b}", str(a - b),
               (f"What is {a} - {b}?", f"How much is {a} minus {b}?", f"Take {b} from {a}."),
               (f"And {a} - {b}?", f"And {a} minus {b}?"),
               (f"{a} - {b} = {a - b}", f"{a} minus {b} is {a - b}."), _near(a - b))  # fmt: skip


def compare(a: int, b: int, word: str) -> Ask:
    """Ask which of two different numbers is bigger or smaller."""
    low, high = sorted((a, b))
    answer, other = (high, low) if word == "bigger" else (low, high)
    return Ask("compare", f"compare {low} {high}", str(answer),
               (f"Which is {word}, {a} or {b}?", f"Name the {word} one of {a} and {b}."),
               (f"And which is {word}, {a} or {b}?",),
               (f"{answer} is {word} than {other}.", f"{low} < {high}", f"{high} > {low}"), (str(other),))  # fmt: skip


def neighbour(a: int, word: str) -> Ask:
    """Ask for the number just after or before a."""
    answer = a + 1 if word == "after" else a - 1
    return Ask("neighbour", f"neighbour {word} {a}", str(answer),
               (f"Which number comes {word} {a}?", f"What is right {word} {a}?"), (f"And {word} {a}?",),
               (f"{answer} comes {word} {a}.", f"{word} {a} : {answer}"), _near(answer))  # fmt: skip


def opposite(word: str, answer: str, others: tuple[str, ...]) -> Ask:
    """Ask for the opposite of a word; `others` are wrong answers."""
    return Ask("opposite", "opposite " + " ".join(sorted((word, answer))), answer,
               (f"What is the opposite of {word}?", f"Say the opposite of {word}.",
                f"Which word is opposite to {word}?"),
               (f"And the opposite of {word}?", f"And of {word}?"),
               (f"the opposite of {word} is {answer}.", f"{word} is not {answer}."), others)  # fmt: skip


def order(digits: list[int]) -> Ask:
    """Ask for the digits in ascending order."""
    rising = sorted(digits)
    text, answer = ", ".join(map(str, digits)), ", ".join(map(str, rising))
    wrong = (", ".join(map(str, rising[::-1])), ", ".join(map(str, [rising[1], rising[0], *rising[2:]])))
    return Ask("order", "order " + answer, answer, (f"Sort {text}.", f"Put {text} in order."), (f"And {text}?",),
               (f"{text} in order : {answer}", f"{text} sorted is {answer}."), wrong)  # fmt: skip


def count(words: list[str]) -> Ask:
    """Ask how many words a list has."""
    text, answer = " ".join(words), str(len(words))
    return Ask("count", f"count {text}", answer,
               (f"How many words are in: {text}?", f"Count the words: {text}"), (f"And in: {text}?",),
               (f"{text} : {answer} words", f"there are {answer} words in: {text}."), _near(len(words)))  # fmt: skip


def pick(words: list[str], which: str) -> Ask:
    """Ask for the first or last word of a list."""
    text, answer = " ".join(words), words[0 if which == "first" else -1]
    return Ask("pick", f"pick {text}", answer,
               (f"What is the {which} word of: {text}?", f"Name the {which} word in: {text}"),
               (f"And the {which} word of: {text}?",),
               (f"the {which} word of {text} is {answer}.",),
               tuple(word for word in NOUNS if word != answer))  # fmt: skip


def fact(name: str, attribute: str) -> Ask:
    """Ask for one attribute of one person."""
    value = world_facts()[name][attribute]
    wordings, followup, statements = {
        "town": ((f"Where does {name} live?", f"In which town does {name} live?"), "And which town?",
                 (f"{name} lives in {value}.", f"the town of {name} is {value}.")),
        "pet": ((f"Which pet does {name} have?", f"What pet does {name} keep?"), "And which pet?",
                (f"{name} keeps a {value}.", f"the pet of {name} is a {value}.")),
        "door": ((f"Which colour is the door of {name}?", f"What colour is {name}'s door?"),
                 "And which colour of door?", (f"{name} has a {value} door.", f"the door of {name} is {value}.")),
        "food": ((f"What does {name} like to eat?", f"Which food does {name} like?"), "And which food?",
                 (f"{name} likes to eat {value}.", f"the food of {name} is {value}.")),
    }[attribute]  # fmt: skip
    return Ask(attribute, f"{attribute} {name}", value, wordings, (followup,), statements,
               tuple(other for other in _VALUES[attribute] if other != value), subject=name)  # fmt: skip


def _draw_compare(rng: random.Random) -> Ask:
    a, b = rng.sample(range(100), 2)
    return compare(a, b, rng.choice(("bigger", "smaller")))


def _draw_subtract(rng: random.Random) -> Ask:
    a = rng.randrange(60)
    return subtract(a, rng.randint(0, min(a, 30)))


def _draw_neighbour(rng: random.Random) -> Ask:
    word = rng.choice(("after", "before"))
    return neighbour(rng.randrange(99) if word == "after" else rng.randrange(1, 100), word)


def _draw_opposite(rng: random.Random) -> Ask:
    pair = rng.choice(_OPPOSITE_PAIRS)
    word, answer = rng.sample(pair, 2)
    return opposite(word, answer, tuple(other for other in _OPPOSITES if other not in pair))


_DRAWS: tuple[tuple[int, Callable[[random.Random], Ask]], ...] = (
    (3, lambda rng: add(rng.randrange(41), rng.randrange(31))),
    (2, _draw_subtract),
    (1, _draw_compare),
    (1, _draw_neighbour),
    (2, _draw_opposite),
    (2, lambda rng: order(rng.sample(range(10), rng.choice((3, 4))))),
    (2, lambda rng: count(rng.choices(NOUNS, k=rng.randint(1, 7)))),
    (1, lambda rng: pick(rng.sample(NOUNS, rng.randint(2, 5)), rng.choice(("first", "last")))),
    (5, lambda rng: fact(rng.choice(_NAMES), rng.choice(ATTRIBUTES))),
)


def draw(rng: random.Random, split: str | None = None) -> Ask:
    """Draw a question of any skill, from one split or (None) from both."""
    weights, draws = zip(*_DRAWS, strict=True)
    while True:
        ask = rng.choices(draws, weights)[0](rng)
        if split is None or split_of(ask.key) == split:
            return ask


def _draw_after(first: Ask, rng: random.Random) -> Ask:
    if first.subject:
        return fact(first.subject, rng.choice([name for name in ATTRIBUTES if name != first.task]))
    if first.task in ("add", "subtract") and rng.random() < 0.6:
        step = rng.randrange(1, 10)
        ask = add(int(first.answer), step)
        return Ask("chain", ask.key, ask.answer, (), (f"Now add {step}.", f"And {step} more?"), (), ask.wrong)
    ask = draw(rng)
    while ask.task != first.task:
        ask = draw(rng)
    return ask


def draw_followup(first: Ask, rng: random.Random, split: str | None = None) -> Ask:
    """Draw a question that follows `first`: about the same person, task or result."""
    for _ in range(40):
        ask = _draw_after(first, rng)
        if split is None or split_of(ask.key) == split:
            return ask
    # A person may have no second attribute in this split; then a full question of any kind follows.
    ask = draw(rng, split)
    return replace(ask, followups=ask.wordings)
