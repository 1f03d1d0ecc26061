"""`lowlevel inspect`: the examples of a step, or one row, token by token, down to the numbers that make the loss."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lowlevel.errors import ConfigError
from lowlevel.inspection import opening
from lowlevel.inspection.inspection import Inspection
from lowlevel.inspection.page import write_page
from lowlevel.inspection.terminal import print_inspection
from lowlevel.running.progress import lines_to
from lowlevel.running.reopening import reopen


def inspect_run(
    run_dir: Path,
    console: Console,
    *,
    step: int | None,
    example: int | None,
    checkpoint: int | None,
    html: Path | None,
) -> Inspection:
    """Inspect a step or a row of a run, print it, and write the page if one is asked for.

    Args:
        run_dir: the run folder.
        console: where the tables go; with a page, only the table of the batch.
        step: optimizer step, counted from 1 as the log does; exactly one of it and `example` is given.
        example: data row, as the data report and error messages name it.
        checkpoint: applied steps of the checkpoint whose weights are looked at; 0 for the adapter as initialised.
        html: file for the page.

    Raises:
        ConfigError: not a run folder, no such step or checkpoint, or a page that cannot be written.
        DataError: a row that was not trained on, or data that changed since the run.
        CheckpointError: damaged checkpoints and no other, or a base or adapter that is not the run's.
    """
    if html and not html.parent.is_dir():
        raise ConfigError(f"--html {html}: no such folder")
    opened = reopen(run_dir, lines_to(console))
    inspection = opening.inspect_run(opened, step=step, example=example, checkpoint=checkpoint)
    print_inspection(inspection, console, details=html is None)
    if html:
        write_page(inspection, html)
        console.print(f"page written to {html}", markup=False)
    return inspection
