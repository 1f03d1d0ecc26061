"""Tables for the terminal; those of texts also for the page of `lowlevel report`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table


def table_of(headings: Sequence[str], rows: Iterable[Sequence[str] | None], **style: Any) -> Table:
    """A table of numbers, and of texts in the columns whose heading begins with "<"; a line is drawn at None."""
    columns = [
        Column(name[1:], overflow="fold") if name.startswith("<") else Column(name, justify="right")
        for name in headings
    ]
    table = Table(*columns, **style)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    return table


@dataclass(frozen=True)
class TextTable:
    """Cells as they are shown; the first `names` columns are words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    names: int = 2
    alarms: Sequence[str] = ()

    def show(self, console: Console) -> None:
        """Print the table, then its alarms."""
        headings = ["<" * (number < self.names) + name for number, name in enumerate(self.columns)]
        console.print(table_of(headings, self.rows, caption=self.note))
        for line in self.alarms:
            console.print(f"alarm: {line}", markup=False)


def with_interval(value: float, low: float | None, high: float | None, digits: str = "+.3g") -> str:
    """A value with its 95 % interval, if it has one."""
    return f"{value:{digits}}" + ("" if low is None or high is None else f" [{low:{digits}}, {high:{digits}}]")
