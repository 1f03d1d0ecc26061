"""A table of texts, for the terminal and for the page of `lowlevel report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


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
        table = Table(caption=self.note)
        for number, name in enumerate(self.columns):
            table.add_column(name, justify="left" if number < self.names else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for line in self.alarms:
            console.print(f"alarm: {line}", markup=False)


def with_interval(value: float, low: float | None, high: float | None, digits: str = "+.3g") -> str:
    """A value with its 95 % interval, if it has one."""
    return f"{value:{digits}}" + ("" if low is None or high is None else f" [{low:{digits}}, {high:{digits}}]")
