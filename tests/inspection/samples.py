"""Examples, a tokenizer with hostile tokens, and runs, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import helpers
import numpy as np
from workspace import CHATS, PAIRS, Workspace, run

from lowlevel.data.examples import PreferenceExample, SFTExample
from lowlevel.data.tokenizer import chat_tokenizer
from lowlevel.inspection import pairs as of_pairs
from lowlevel.inspection import sft as of_sft
from lowlevel.inspection.example import Inspection
from lowlevel.inspection.pairs import inspect_pairs
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.sft import inspect_sft

HOSTILE = ("<script>document.title='bad'</script>", "\"'><img src=x onerror=alert(1)>", "[red]{{ 7 * 7 }}[/red]")
FIRST_HOSTILE = 259  # ids 0 to 258 are three special tokens and the bytes
STEPS = 5


def chats(count: int = 8) -> list[SFTExample]:
    return [SFTExample(x.row, f"rows:{x.row}", x.input_ids, x.labels) for x in helpers.ragged_examples(count)]


def labelled(count: int = 8) -> list[SFTExample]:
    made = helpers.labelled_examples(count)
    return [SFTExample(x.row, f"rows:{x.row}", x.input_ids, x.labels, x.values) for x in made]


def pairs(count: int = 8) -> list[PreferenceExample]:
    return [
        PreferenceExample(x.row, f"rows:{x.row}", x.prompt_ids, x.chosen_ids, x.rejected_ids)
        for x in helpers.ragged_pairs(count)
    ]


def hostile_pairs(count: int = 8) -> list[PreferenceExample]:
    """Pairs with every hostile token in prompt and completions, and a place that is markup, too."""
    hostile = np.arange(FIRST_HOSTILE, FIRST_HOSTILE + len(HOSTILE))
    return [
        replace(
            pair,
            where=f"<b>{pair.row}</b>",
            prompt_ids=np.concatenate([hostile, pair.prompt_ids]),
            chosen_ids=np.concatenate([pair.chosen_ids, hostile]),
        )
        for pair in pairs(count)
    ]


def hostile_chats(count: int = 3) -> list[SFTExample]:
    hostile = np.arange(FIRST_HOSTILE, FIRST_HOSTILE + len(HOSTILE))
    return [
        replace(
            chat,
            where=f"<b>{chat.row}</b>",
            input_ids=np.concatenate([hostile, chat.input_ids, hostile]),
            labels=np.concatenate([np.full(len(hostile), -100), chat.labels, hostile]),
        )
        for chat in chats(count)
    ]


def hostile_pieces() -> TokenPieces:
    return TokenPieces(chat_tokenizer(helpers.byte_tokenizer(HOSTILE), helpers.ZEPHYR))


def inspection_of_pairs(policy, pieces, examples=None, **config) -> Inspection:
    method = helpers.dpo(**config)
    records = tuple(inspect_pairs(policy, method, examples or hostile_pairs()))
    view = of_pairs.view(method)
    return Inspection("<i>run</i>", "step 3", "step-00000002", "logged: 0.5", pieces, method, view, records)


def inspection_of_chats(policy, pieces, examples=None) -> Inspection:
    method = helpers.sft()
    records = tuple(inspect_sft(policy, method, examples or hostile_chats()))
    return Inspection("<i>run</i>", "step 3", "final adapter", None, pieces, method, of_sft.view(method), records)


@dataclass(frozen=True)
class Runs:
    """Runs of `STEPS` steps: each step logged, each saved."""

    space: Workspace
    sft: Path  # without dropout
    dpo: Path  # on sft, with lora_dropout 0.1, which dpo.disable_dropout keeps off
    ipo: Path  # not a function of the margin; prompts not shared


def make_runs(folder: Path) -> Runs:
    helpers.write_tiny_base(folder / "tiny")
    rows = (helpers.write_jsonl(folder / "chats.jsonl", CHATS), helpers.write_jsonl(folder / "pairs.jsonl", PAIRS))
    space = Workspace(folder, folder / "tiny", *rows)
    train = {"logging_steps": 1, "save_steps": 1, "save_total_limit": 99, "max_steps": STEPS}
    parent = {"adapter": str(folder / "sft")}
    files = [
        space.write("sft", "sft", train=train, lora={"lora_dropout": 0.0}),
        space.write("dpo", "dpo", train={**train, "learning_rate": 3e-3}, model=parent),
        space.write("ipo", "dpo", train=train, data={"packing": False}, dpo={"loss_type": "ipo", "beta": 0.4}),
    ]
    for file in files:
        said = run(file.stem if file.stem == "sft" else "dpo", file)
        assert said.code == 0, said.err
    return Runs(space, *(folder / file.stem for file in files))
