"""The result of a replay, and its tables."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import box

from lowlevel.errors import LowlevelError
from lowlevel.replaying.compare import NUMBERS, TENSORS, Row
from lowlevel.replaying.session import Outcome
from lowlevel.table import table_of

HEADINGS = ("<quantity", "logged", "replayed", "difference", "<identical")
STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False}


class ReplayDiffersError(LowlevelError):
    """A replay that differs from the log or from saved tensors; exit code 1."""


@dataclass
class Replay:
    """The result of a replay. `rows` are in the order of steps; as text, their table."""

    step: int
    start: str
    moved: str | None  # why numbers may differ from the run's in their last bits; None: bits are compared
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be compared, and why
    record: dict[str, Any] = field(default_factory=dict)  # means over the step's window, as the loop logs them
    outcomes: list[Outcome] = field(default_factory=list)  # of the step under other settings

    @property
    def exact(self) -> bool:
        """Whether bits are compared; else the tolerances of lowlevel.replaying.compare hold."""
        return self.moved is None

    @property
    def first_difference(self) -> Row | None:
        """The first row beyond its tolerance, or None."""
        return next((row for row in self.rows if not row.good), None)

    def check(self) -> None:
        """Raise ReplayDiffersError if a row differs."""
        row = self.first_difference
        if row is not None:
            raise ReplayDiffersError(
                f"the replay first differs at step {row.step}, {row.quantity}: logged {row.logged}, "
                f"replayed {row.replayed}, largest difference {row.difference:.3g}"
            )

    def __repr__(self) -> str:
        out = io.StringIO()
        print_replay(self, Console(file=out, width=120, force_terminal=False, force_jupyter=False))
        return out.getvalue()


def print_replay(found: Replay, console: Console) -> None:
    """Every row of the step, a summary of the steps before it, and its outcome under other settings."""
    console.print(f"step {found.step}, replayed from {found.start}", markup=False)
    own = [row for row in found.rows if row.step == found.step]
    earlier = [row for row in found.rows if row.step != found.step]
    if earlier:
        console.print(f"  before it: {_summary(earlier)}", markup=False)
    if own:
        console.print(table_of(HEADINGS, map(_cells, own), **STYLE))
    elif found.record:
        numbers = ", ".join(f"{k} {v:.6g}" for k, v in found.record.items() if k in ("loss", "grad_norm"))
        console.print(f"  replayed: {numbers} (means since the log line before)", markup=False)
    notes = list(found.notes)
    if found.moved and not all(row.identical for row in found.rows):
        notes.append(f"{found.moved}: numbers may differ by {NUMBERS:.0%} and tensors by {TENSORS:.0%} of their norm")
    elif found.first_difference:
        notes.append(
            "bits also differ between versions of torch, CPUs and numbers of threads (here torch "
            f"{torch.__version__}, {torch.get_num_threads()} threads; the run: environment.json)"
        )
    for note in notes:
        console.print(f"  {note}", markup=False)
    if outcomes := found.outcomes:
        lines = [(name, *(f"{one.numbers[name]:.6g}" for one in outcomes)) for name in outcomes[0].numbers]
        title = {"title": "only this step, under other settings", "title_justify": "left"}
        console.print(table_of(("<quantity", *(one.settings for one in outcomes)), lines, **STYLE, **title))


def _summary(rows: Sequence[Row]) -> str:
    steps = sorted({row.step for row in rows})
    wrong = [row for row in rows if not row.good]
    span = f"logged step {steps[0]}" if len(steps) == 1 else f"{len(steps)} logged steps, {steps[0]} to {steps[-1]}"
    if wrong:
        return f"{span}: {len(wrong)} of {len(rows)} numbers differ, first {wrong[0].quantity} of step {wrong[0].step}"
    same = all(row.identical for row in rows)
    return f"{span}: {len(rows)} numbers, {'identical' if same else 'within the tolerance'}"


def _cells(row: Row) -> tuple[str, ...]:
    difference = "missing" if math.isinf(row.difference) else f"{row.difference:.3g}"
    answer = "yes" if row.identical else ("within tolerance" if row.good else "NO")
    return row.quantity, row.logged, row.replayed, difference, answer
