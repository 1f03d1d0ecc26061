"""An inspection in a terminal: the table of the batch, then for each example its tokens and the way to its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from lowlevel.inspection.example import Example, Inspection, Text
from lowlevel.inspection.pairs import fall_line
from lowlevel.inspection.tables import batch_table, caption, facts_of, steps_of, summary, token_lines

RAISES, LOWERS = "blue", "dark_orange"
COLOURED = ("adds", "weight", "advantage", "margin")  # by their sign
SHOWN_PROMPT = 400  # last characters of a longer prompt
LEAST = 12  # columns for a text beside numbers
FORMULA = 20  # columns for a formula


def print_inspection(inspection: Inspection, console: Console, *, details: bool = True) -> None:
    """Print the batch, and with `details` each example."""
    for line in (inspection.headline, inspection.conditions, inspection.result):
        _say(line, console)
    view = inspection.view
    headings, lines = batch_table(inspection, (*view.more, *view.facts))
    if len(lines) > 1:
        rows = [(line.row, *line.cells, line.note) for line in lines]
        names = ("row", *headings, "<text" if view.by_text else "<from")
        console.print(_table(names, rows, console.width, caption(inspection)))
    if not details:
        return
    shown = inspection.examples[0].texts[0].columns
    _say("; ".join(f"{name}: {word}" for name, word in view.words.items() if name in shown), console, "dim")
    for example in inspection.examples:
        _print_example(example, inspection, console)


def _print_example(example: Example, inspection: Inspection, console: Console) -> None:
    pieces, view = inspection.pieces, inspection.view
    _say(f"\nrow {example.row}  {example.where}", console, "bold")
    text = pieces.decode(example.prompt_ids).strip()
    _say(f"… {text[-SHOWN_PROMPT:]}" if len(text) > SHOWN_PROMPT else text, console, "dim")
    for one in (*example.texts, *example.others):
        _print_text(one, inspection, console)
    if fall := fall_line(example, pieces):
        _say(fall.sentence, console)
    spec = inspection.method.spec
    if steps := steps_of(example):
        for table in _path_tables(example, steps, f"{spec.name}: {spec.paper}; {view.symbols}", console.width):
            console.print(table)
    else:
        _say(", ".join(f"{name} {value}" for name, value in facts_of(example, view)), console)


def _print_text(text: Text, inspection: Inspection, console: Console) -> None:
    """The tokens with their numbers; of a text whose tokens have no prediction the text itself."""
    plain = "" if text.predicted else f": {inspection.pieces.decode(text.ids)}"
    _say(f"{text.name}: {summary(text)}{plain}", console)
    if text.predicted:
        lines = token_lines(text, inspection.pieces)
        rows = [(line.position, line.token, *line.numbers.values(), "  ".join(line.others)) for line in lines]
        console.print(_table(("#", "<token", *text.columns, "<likeliest others"), rows, console.width))


def _path_tables(example: Example, steps: Sequence[tuple[str, str, list[str]]], notes: str, width: int) -> list[Table]:
    """The way to the loss, with as many texts beside each other as fit."""
    texts, tables = [text.name for text in example.texts], []
    each = 2 + max(cell_len(cell) for cell in (*texts, *(value for _, _, values in steps for value in values)))
    fits = max(1, (width - max(cell_len(name) for name, _, _ in steps) - FORMULA - 4) // each)
    for start in range(0, len(texts), fits):
        part, rows = slice(start, start + fits), []
        names = texts[part] if len(texts) > 1 else ["value"]
        for name, formula, values in steps:
            cells = values[part] if len(values) == len(texts) else [""] * (len(names) - 1) + values
            rows.append((name, formula, *cells))
        last = notes if start + fits >= len(texts) else ""
        tables.append(_table(("quantity", "<formula", *names), rows, width, last, wrap=True))
    return tables


def _table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, caption: str = "", *, wrap: bool = False
) -> Table:
    """Numbers in full and right-aligned, as many columns as fit; texts (heading with "<") in the remaining width."""
    names = [heading.removeprefix("<") for heading in headings]
    texts = [i for i, heading in enumerate(headings) if heading.startswith("<")]
    widths = [max(map(cell_len, [name, *(row[i] for row in rows)])) for i, name in enumerate(names)]
    kept, room = list[int](), width
    for i, one in enumerate(widths):
        least = min(one, LEAST) if i in texts else one
        if least + 2 <= room:
            kept, room = [*kept, i], room - least - 2
    for i in (i for i in texts if i in kept):
        more = min(room, max(0, widths[i] - LEAST))
        widths[i], room = min(widths[i], LEAST) + more, room - more
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(caption=caption or None, caption_justify="left", **style)
    overflow: Any = "fold" if wrap else "ellipsis"
    for i in kept:
        justify: Any = "left" if i in texts or i == 0 else "right"
        table.add_column(names[i], justify=justify, width=widths[i], no_wrap=not wrap, overflow=overflow)
    for row in rows:
        table.add_row(*(_coloured(names[i], row[i]) for i in kept))
    return table


def _say(line: str, console: Console, style: str = "") -> None:
    console.print(line, style=style, markup=False, highlight=False)


def _coloured(name: str, cell: str) -> Styled:
    """A cell, which is text and not markup; some numbers in the colour of their sign."""
    styles = {"-": LOWERS, "+": RAISES} if name in COLOURED else {}
    return Styled(cell, style=styles.get(cell[:1], ""))
