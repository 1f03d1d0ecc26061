"""The demo's data: chats, preference pairs and held-out check items of a small world with checkable answers.

    python -m benchmarks.demo_base.rows        # writes lowlevel/demo/rows

All rows are drawn from `random.Random(seed)`: the same arguments give the same rows on every machine. No question of a
"heldout" row, in any turn, can occur in a "train" row; see `skills.split_of`.
"""

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.demo_base.skills import draw, draw_followup
from lowlevel.demo.world import CURT, ENDINGS, MIDDLES, OPENERS, POLITE, ROWS, SPLITS

Message = dict[str, str]
SIZES = {"train": 2400, "heldout": 240, "check": 120}
# Polite replies are the minority, so that after SFT the preferred style is rare even with greedy decoding, and DPO has
# something to change.
STYLES = ("polite", "curt", "rambling")
SFT_STYLE_WEIGHTS = (20, 50, 30)
FOLLOWUP_SHARE = 0.25
SYSTEM_SHARE = 0.1
SYSTEM_TEXT = "You answer questions about a small world."
# (style, is the answer right) of the rejected reply; the chosen one is always polite and right.
_REJECTED = (("rambling", True), ("curt", True), ("polite", False), ("curt", False), ("rambling", False))
_REJECTED_WEIGHTS = (35, 30, 15, 10, 10)


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


def draw_items(split: str, n: int, seed: int, purpose: str) -> tuple[list[Item], random.Random]:
    """Draw n items; each `purpose` (SFT, preference, check) has its own random stream. ValueError: unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    # A string seed is hashed by random itself (SHA-512), so it does not depend on PYTHONHASHSEED.
    rng = random.Random(f"{purpose} {split} {seed}")
    return [_draw_item(rng, split) for _ in range(n)], rng


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def sft_rows(split: str, n: int, seed: int) -> list[dict[str, list[Message]]]:
    """Return n chats {"messages": [...]}, a quarter with two exchanges; answers right, styles mixed at random."""
    items, rng = draw_items(split, n, seed, "sft")
    return [{"messages": [*item.prompt, _assistant(write_reply(item.answer, draw_style(rng), rng))]} for item in items]


def preference_rows(split: str, n: int, seed: int) -> list[dict[str, list[Message]]]:
    """Return n pairs {"prompt", "chosen", "rejected"}; chosen is right and polite, rejected wrong, curt or rambling."""
    items, rng = draw_items(split, n, seed, "preference")
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
    """Return n prompts {"prompt", "completion", "answer"} for online methods."""
    items, rng = draw_items(split, n, seed, "prompt")
    return [
        {
            "prompt": item.prompt,
            "completion": [_assistant(write_reply(item.answer, draw_style(rng), rng))],
            "answer": item.answer,
        }
        for item in items
    ]


def check_items(n: int, seed: int) -> list[Item]:
    """Return n held-out items with different prompts, for generating replies."""
    items: dict[str, Item] = {}
    drawn, _ = draw_items("heldout", 4 * n, seed, "check")
    for item in drawn:
        items.setdefault(str(item.prompt), item)
    if len(items) < n:
        raise ValueError(f"the world gave only {len(items)} different held-out prompts of the {n} asked for")
    return list(items.values())[:n]


def shipped() -> Iterator[tuple[str, list[Any]]]:
    """The files of lowlevel/demo/rows: name and rows."""
    for name, make in (("sft", sft_rows), ("preference", preference_rows), ("prompt", prompt_rows)):
        for split in SPLITS:
            yield f"{name}-{split}", list(make(split, SIZES[split], 0))
    yield "check", [{"prompt": item.prompt, "answer": item.answer} for item in check_items(SIZES["check"], 0)]


def main() -> None:
    """Write them."""
    ROWS.mkdir(exist_ok=True)
    for name, rows in shipped():
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        (ROWS / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
