"""An inspection in a terminal: a table of the batch, then a table of tokens for each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lowlevel.inspection.inspection import Inspection
from lowlevel.inspection.kto_and_reward import LabelledRecord, RewardRecord
from lowlevel.inspection.lines import TokenLine, completion_lines, fall_line, path_of, sequence_lines
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import percent, plain, reading_of, signed, source, sum_name
from lowlevel.inspection.records import PairRecord, SequenceRecord
from lowlevel.inspection.sampled import SampledRecord

WIDE = 110  # terminal width from which a pair's tables include the likeliest alternatives
RAISES, LOWERS = "blue", "dark_orange"
PAIR_COLUMNS = ("policy", "reference", "log-ratio", "adds", "sum")
CLIPPED = "; clipped: by the tokens' ratios together, their "
SHOWN_PROMPT = 400  # last characters of a longer prompt


def print_inspection(inspection: Inspection, console: Console, *, details: bool = True) -> None:
    """Print the batch, and with `details` each example."""
    for line in (inspection.headline, inspection.conditions, inspection.result):
        console.print(line, markup=False, highlight=False)
    batch, example = PRINTED[inspection.method.name]
    if len(inspection.records) > 1:
        console.print(batch(inspection, console.width))
    for record in inspection.records if details else ():
        example(record, inspection, console)


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    width: int,
    *,
    caption: str | None = None,
    wrap: bool = False,
) -> Table:
    """Numbers in full and right-aligned; texts (heading with "<") left-aligned in the remaining width."""
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]  # a str would be markup
    names = [heading.removeprefix("<") for heading in headings]
    widths = [max([cell_len(name), *(row[i].cell_len for row in cells)]) for i, name in enumerate(names)]
    texts = [i for i, heading in enumerate(headings) if heading.startswith("<")]
    room = width - 2 * (len(headings) + 1) - sum(w for i, w in enumerate(widths) if i not in texts)
    for number, i in enumerate(texts):
        widths[i] = max(3, min(widths[i], room if number + 1 == len(texts) else room // 2))
        room -= widths[i]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left", pad_edge=False)
    overflow: Any = "fold" if wrap else "ellipsis"
    for i, name in enumerate(names):
        justify: Any = "left" if i in texts or i == 0 else "right"
        table.add_column(name, justify=justify, width=widths[i], no_wrap=not wrap, overflow=overflow)
    for row in cells:
        table.add_row(*row)
    return table


def _sequences_table(inspection: Inspection, width: int) -> Table:
    rows, total = [], inspection.loss * inspection.count or 1.0
    for record in inspection.sequences:
        loss, tokens = float(record.loss), len(record.tokens)
        numbers = (plain(loss), plain(loss / max(1, tokens)), percent(loss / total))
        rows.append((str(record.row), str(tokens), *numbers, record.where))
    return _table(("row", "learned", "loss", "loss/token", "share of the step", "<from"), rows, width)


def _pairs_table(inspection: Inspection, width: int) -> Table:
    """One line per pair; with two weights if the loss weighs the completions separately."""
    reading = reading_of(inspection.method.spec.name)
    weights = ("weight+", "weight-") if reading in ("both", "quantiles") else ("weight",)
    rows: list[Sequence[str | Text]] = []
    for record in inspection.pairs:
        sides = (record.chosen, record.rejected)
        tokens, rewards = [str(len(side.tokens)) for side in sides], [signed(float(side.reward)) for side in sides]
        slopes = [plain(float(side.weight)) for side in sides[: len(weights)]]
        margin, loss = _coloured("margin", signed(float(record.margin))), plain(float(record.loss))
        rows.append((str(record.row), *tokens, *rewards, margin, *slopes, loss))
    headings = ("row", "tokens+", "tokens-", "reward+", "reward-", "margin", *weights, "loss")
    caption = "weight: of the averaged margin" if reading == "averages" else None
    return _table(headings, rows, width, caption=caption)


def _labelled_table(inspection: Inspection, width: int) -> Table:
    rows: list[Sequence[str | Text]] = []
    for record in inspection.labelled:
        one = record.completion
        reward, weight = _coloured("margin", signed(float(one.reward))), signed(float(one.weight))
        numbers = (reward, weight, plain(float(record.loss)))
        rows.append((str(record.row), record.label, str(len(one.tokens)), *numbers, record.where))
    caption = f"z₀ {plain(float(inspection.labelled[0].kl.clamp(min=0)))}; weight: −dL/d(reward)"
    return _table(("row", "label", "tokens", "reward", "weight", "loss", "<from"), rows, width, caption=caption)


def _rewards_table(inspection: Inspection, width: int) -> Table:
    rows: list[Sequence[str | Text]] = []
    for record in inspection.rewards:
        rewards = (signed(float(record.chosen)), signed(float(record.rejected)))
        margin = _coloured("margin", signed(float(record.margin)))
        numbers = (*rewards, margin, plain(record.weights[0]), plain(float(record.loss)))
        rows.append((str(record.row), *numbers, record.where))
    headings = ("row", "chosen", "rejected", "margin", "weight", "loss", "<from")
    return _table(headings, rows, width, caption="rewards; weight: −dL/d(chosen reward)")


def _sampled_table(inspection: Inspection, width: int) -> Table:
    rows: list[Sequence[str | Text]] = []
    for one in inspection.sampled:
        x, clipped = one.rollout, percent(float(one.clipped.float().mean()))
        advantage = _coloured("margin", signed(float(x.advantages.mean())))
        length = f"{len(one.tokens)}{'' if x.ended else ' cut'}"
        numbers = (plain(x.reward), advantage, length, plain(float(one.ratios.mean())), clipped, plain(float(one.loss)))
        rows.append((f"{x.row}.{x.sample}", *numbers, " ".join(x.text.split())))
    headings = ("row", "reward", "advantage", "tokens", "ratio", "clipped", "loss", "<completion")
    caption = "advantage, ratio: means of the tokens; loss: their weighted sum"
    level = inspection.method.settings.get("importance_sampling_level", "token")
    caption += {"sequence": CLIPPED + "geometric mean", "sequence_sum": CLIPPED + "product"}.get(str(level), "")
    return _table(headings, rows, width, caption=caption)


def _print_sampled(record: SampledRecord, inspection: Inspection, console: Console) -> None:
    x, pieces, rows = record.rollout, inspection.pieces, list[Sequence[str | Text]]()
    _print_title(x.row, f"{x.where}, sample {x.sample}", torch.from_numpy(x.prompt_ids), pieces, console)
    parts = ", ".join(f"{name} {plain(value)}" for name, value in x.rewards.items())
    out = "" if x.counted else "; not in the loss"
    console.print(f"reward {plain(x.reward)} ({parts}){out}", markup=False, highlight=False)
    columns = {"logp": record.tokens.logps, "sampled at": record.old_logps, "ratio": record.ratios}
    columns |= {} if record.kl is None else {"kl": record.kl}
    columns |= {"advantage": torch.from_numpy(x.advantages), "loss": record.token_losses}
    for i, token in enumerate(record.tokens.ids.tolist()):
        numbers = (plain(float(values[i])) for values in columns.values())
        rows.append(
            (str(int(record.tokens.positions[i])), pieces.text(token), *numbers, "clipped" * bool(record.clipped[i]))
        )
    console.print(_table(("#", "<token", *columns, "<"), rows, console.width))


def _print_sequence(record: SequenceRecord, inspection: Inspection, console: Console) -> None:
    pieces = inspection.pieces
    _print_title(record.row, record.where, record.input_ids[: int(record.tokens.positions[0])], pieces, console)
    lines = sequence_lines(record, pieces)
    terms = "loss" if "loss" in lines[0].numbers else "-logp"
    read = "".join(f"; {name} {value:g}" for name, value in record.values.items())
    caption = f"loss {plain(float(record.loss))} = sum of {terms}; share: of this loss; entropy in nats{read}"
    console.print(_tokens_table(lines, tuple(lines[0].numbers), console.width, others=True, caption=caption))


def _print_compared(record: PairRecord | LabelledRecord, inspection: Inspection, console: Console) -> None:
    _print_title(record.row, record.where, record.prompt_ids, inspection.pieces, console)
    running, sums, paired = record.running_sums.tolist(), sum_name(inspection.method.spec.name), bool(inspection.pairs)
    per_token = "beta x log-ratio / n" if sums == "averaged margin" else "beta x log-ratio"
    wide = console.width >= WIDE
    for name, side, part in record.sides:
        sign, end = ("-", f"; the last sum is the {sums}") if name == "rejected" else ("", "")
        console.print(f"{name}: each token adds {sign}{per_token} to the {sums}{end}", markup=False, highlight=False)
        lines = completion_lines(side, running[part], inspection.pieces)
        console.print(_tokens_table(lines, PAIR_COLUMNS + ("prob", "rank") * wide, console.width, others=wide))
    if isinstance(record, PairRecord) and (fall := fall_line(record, inspection.pieces)):
        console.print(fall.sentence, markup=False, highlight=False)
    console.print(_path_table(record, inspection, ", x margin, a, b log-ratios, d = a − b" * paired, console.width))


def _print_rewards(record: RewardRecord, inspection: Inspection, console: Console) -> None:
    _print_title(record.row, record.where, record.prompt_ids, inspection.pieces, console)
    for name, ids, reward in (
        ("chosen", record.chosen_ids, record.chosen),
        ("rejected", record.rejected_ids, record.rejected),
    ):
        console.print(f"{name} {signed(float(reward))}: {inspection.pieces.decode(ids)}", markup=False, highlight=False)
    console.print(_path_table(record, inspection, "", console.width))


def _tokens_table(
    lines: Sequence[TokenLine], columns: Sequence[str], width: int, *, others: bool, caption: str | None = None
) -> Table:
    """One line per token with the named numbers."""
    rows: list[Sequence[str | Text]] = []
    for line in lines:
        numbers, likeliest = (_coloured(name, line.numbers[name]) for name in columns), "  ".join(line.others)
        rows.append((line.position, line.token, *numbers, *([likeliest] * others)))
    return _table(("#", "<token", *columns, *(["<likeliest others"] * others)), rows, width, caption=caption)


def _path_table(
    record: PairRecord | LabelledRecord | RewardRecord, inspection: Inspection, more: str, width: int
) -> Table:
    """The steps to the loss; `more` explains their signs. A completion alone has one column of values."""
    headings, rows = ("value",) if inspection.labelled else ("chosen", "rejected", "pair"), []
    for step in path_of(record, inspection.method):
        numbers = (step.chosen, step.rejected, step.pair)[-len(headings) :]
        rows.append((step.name, step.formula, *("" if number is None else plain(number, 5) for number in numbers)))
    caption = f"{source(inspection.method.spec)}; σ sigmoid{more}"
    return _table(("quantity", "<formula", *headings), rows, width, caption=caption, wrap=True)


def _print_title(row: int, where: str, prompt: Tensor, pieces: TokenPieces, console: Console) -> None:
    console.print(f"\nrow {row}  {where}", style="bold", markup=False, highlight=False)
    text = pieces.decode(prompt).strip()
    cut = f"… {text[-SHOWN_PROMPT:]}" if len(text) > SHOWN_PROMPT else text
    console.print(cut, style="dim", markup=False, highlight=False)


def _coloured(name: str, number: str) -> Text:
    """A number; contributions to the margin in the colour of their sign."""
    styles = {"-": LOWERS, "+": RAISES} if name in ("adds", "margin") else {}
    return Text(number, style=styles.get(number[:1], ""))


PRINTED: dict[str, tuple[Callable[..., Table], Callable[..., None]]] = {  # the batch, and one example
    "sft": (_sequences_table, _print_sequence),
    "dpo": (_pairs_table, _print_compared),
    "kto": (_labelled_table, _print_compared),
    "reward": (_rewards_table, _print_rewards),
    **dict.fromkeys(("grpo", "rloo", "ppo"), (_sampled_table, _print_sampled)),
}
