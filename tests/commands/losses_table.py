"""`lowlevel losses` asked, and its answers read: shared by the tests of its numbers and of its print."""

import json
import re
from pathlib import Path

from lowlevel.losses import LOSSES
from lowlevel.losses.dpo_table import HYPERPARAMETERS

REFERENCES = json.loads((Path(__file__).parents[1] / "references" / "losses.json").read_text(encoding="utf-8"))
LOGPS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
FLAGS = {**{key: f"--{key.replace('_', '-')}" for key in LOGPS}, "n": "--chosen-length", "m": "--rejected-length"}
P = ("--chosen", -10, "--rejected", -12, "--ref-chosen", -11, "--ref-rejected", -11.5, "--beta", 0.1)
ALL_FLAGS = {
    key: f"--{key.replace('_', '-')}"
    for key in (
        *LOGPS,
        "chosen_length",
        "rejected_length",
        "margin",
        "log_square_sum",
        "beta",
        "label_smoothing",
        *HYPERPARAMETERS,
    )
}


def alone_is_other(case: dict) -> bool:
    """aot sorts over the pairs of a batch: one pair of these points has another loss."""
    return case["loss"].startswith("aot") and case["point"] in "BE"


def flags(point: dict[str, list[float]], pair: int, parameters: dict[str, float]) -> list[object]:
    words = [word for key, flag in FLAGS.items() for word in (flag, point[key][pair])]
    return words + [word for key, value in parameters.items() for word in (f"--{key.replace('_', '-')}", value)]


def document(cli, *words: object) -> dict:
    said = cli("losses", "--json", *words)
    assert (said.code, said.err) == (0, "")

    def refuse(text: str):
        raise AssertionError(f"{text} is no JSON")

    return json.loads(said.out, parse_constant=refuse)


def by_name(cli, *words: object) -> dict[str, dict]:
    return {row["name"]: row for row in document(cli, *words)["losses"]}


def shown(cli, *words: object) -> str:
    said = cli("losses", *words)
    assert (said.code, said.err) == (0, "")
    return said.out


def table_of(text: str) -> dict[str, list[str]]:
    """The numbers of the first table, by loss."""
    rows = (re.match(r"^ *([a-z_]+) +(?=[-\d])([-+.\de ]+)$", line.rstrip()) for line in text.splitlines())
    return {row[1]: row[2].split() for row in rows if row and row[1] in LOSSES and " " in row[2].strip()}


def refused(said, *texts: str) -> None:
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not re.search("Traceback|nan ", said.err)
    for text in texts:
        assert text in said.err
