"""The demo's data: chats, preference pairs and held-out check items of a small world with checkable answers.

All rows are drawn from `random.Random(seed)`: the same arguments give the same rows on every machine. No question of a
"heldout" row, in any turn, can occur in a "train" row; see `skills.split_of`.
"""

import random
from dataclasses import dataclass

from lowlevel.demo.replies import draw_style, parse_reply, preferred_style, write_reply
from lowlevel.demo.skills import draw, draw_followup

Message = dict[str, str]
FOLLOWUP_SHARE = 0.25
SYSTEM_SHARE = 0.1
SYSTEM_TEXT = "You answer questions about a small world."
# (style, is the answer right) of the rejected reply; the chosen one is always polite and right.
_REJECTED = (("rambling", True), ("curt", True), ("polite", False), ("curt", False), ("rambling", False))
_REJECTED_WEIGHTS = (35, 30, 15, 10, 10)


@dataclass(frozen=True)
class Item:
    """One prompt with its answer."""

    turns: tuple[str, ...]  # of the user
    replies: tuple[str, ...]  # of the assistant, to all turns but the last
    answer: str
    task: str
    keys: tuple[str, ...]  # of the facts, a turn each
    wrong: tuple[str, ...]  # plausible wrong answers to the last turn
    system: str = ""

    @property
    def prompt(self) -> list[Message]:
        """The messages up to the last turn of the user, to which `answer` belongs."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn, reply in zip(self.turns, self.replies, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": reply}]
        return [*messages, {"role": "user", "content": self.turns[-1]}]


def _draw_item(rng: random.Random, split: str) -> Item:
    asks = [draw(rng, split)]
    turns = [rng.choice(asks[0].wordings)]
    if rng.random() < FOLLOWUP_SHARE:
        asks.append(draw_followup(asks[0], rng, split))
        turns.append(rng.choice(asks[1].followups))
    replies = tuple(write_reply(ask.answer, draw_style(rng), rng) for ask in asks[:-1])
    system = SYSTEM_TEXT if rng.random() < SYSTEM_SHARE else ""
    last = asks[-1]
    return Item(tuple(turns), replies, last.answer, last.task, tuple(ask.key for ask in asks), last.wrong, system)


def _draw_items(split: str, n: int, seed: int, purpose: str) -> tuple[list[Item], random.Random]:
    """Draw n items; each `purpose` (SFT, preference, check) has its own random stream. ValueError: unknown split."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    # A string seed is hashed by random itself (SHA-512), so it does not depend on PYTHONHASHSEED.
    rng = random.Random(f"{purpose} {split} {seed}")
    return [_draw_item(rng, split) for _ in range(n)], rng


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def sft_rows(split: str, n: int, seed: int) -> list[dict[str, list[Message]]]:
    """Return n chats {"messages": [...]}, a quarter with two exchanges; answers right, styles mixed at random."""
    items, rng = _draw_items(split, n, seed, "sft")
    return [{"messages": [*item.prompt, _assistant(write_reply(item.answer, draw_style(rng), rng))]} for item in items]


def preference_rows(split: str, n: int, seed: int) -> list[dict[str, list[Message]]]:
    """Return n pairs {"prompt", "chosen", "rejected"}; chosen is right and polite, rejected wrong, curt or rambling."""
    items, rng = _draw_items(split, n, seed, "preference")
    rows = []
    for item in items:
        style, right = rng.choices(_REJECTED, _REJECTED_WEIGHTS)[0]
        rejected = item.answer if right else rng.choice(item.wrong)
        rows.append({
            "prompt": item.prompt,
            "chosen": [_assistant(write_reply(item.answer, "polite", rng))],
            "rejected": [_assistant(write_reply(rejected, style, rng))],
        })  # fmt: skip
    return rows


def prompt_rows(split: str, n: int, seed: int) -> list[dict[str, object]]:
    """Return n prompts {"prompt", "completion", "answer"} for an online method; `right_answer` is their reward."""
    items, rng = _draw_items(split, n, seed, "prompt")
    return [
        {
            "prompt": item.prompt,
            "completion": [_assistant(write_reply(item.answer, draw_style(rng), rng))],
            "answer": item.answer,
        }
        for item in items
    ]


def right_answer(completions: list[str], answer: list[str], **others: object) -> list[float]:
    """Reward of the demo's replies: 1 for a whole reply in one of the known forms with the right answer, else 0."""
    parsed = map(parse_reply, completions)
    return [float(found is not None and found[1] == right) for found, right in zip(parsed, answer, strict=True)]


def polite(completions: list[str], **others: object) -> list[float]:
    """1 for a reply in the preferred style, with any answer, else 0."""
    return [float(preferred_style(text)) for text in completions]


def check_items(n: int, seed: int) -> list[Item]:
    """Return n held-out items with different prompts, for generating replies."""
    items: dict[str, Item] = {}
    drawn, _ = _draw_items("heldout", 4 * n, seed, "check")
    for item in drawn:
        items.setdefault(str(item.prompt), item)
    if len(items) < n:
        raise ValueError(f"the world gave only {len(items)} different held-out prompts of the {n} asked for")
    return list(items.values())[:n]


def exact_match(reply: str, item: Item) -> bool:
    """Whether the whole reply has one of the known forms and the right answer."""
    parsed = parse_reply(reply)
    return parsed is not None and parsed[1] == item.answer
