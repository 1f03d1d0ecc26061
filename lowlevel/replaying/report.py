"""`lowlevel replay`: take a logged step again from the checkpoint before it, and hold it against the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table, box

from lowlevel.config.schema import RunConfig
from lowlevel.determinism import deterministic_mode
from lowlevel.errors import NonFiniteError
from lowlevel.replaying.compare import NUMBERS, TENSORS, Row
from lowlevel.replaying.dump import Dump, check_target, observe
from lowlevel.replaying.replay import Replay, ReplayDiffersError, replay
from lowlevel.replaying.session import Session, open_session
from lowlevel.replaying.what_if import Outcome, parse_settings, what_if
from lowlevel.running.forensics import examine_error
from lowlevel.running.progress import lines_to
from lowlevel.running.run_folder import RunFolder


def replay_run(
    run_dir: Path,
    console: Console,
    *,
    step: int,
    start: int | None = None,
    dump: Path | None = None,
    layers: bool = False,
    settings: Sequence[str] = (),
) -> Replay:
    """Replay a step of a run and print how it stands to what was logged; writes nothing into the run folder.

    Args:
        run_dir: the run folder, of a finished, stopped or running run.
        console: where the tables go.
        step: optimizer step, counted from 1 as the log does.
        start: applied steps of the checkpoint to start from; None for the newest one before the step.
        dump: folder for every intermediate of the step.
        layers: outputs of the decoder layers too.
        settings: "NAME=VALUE[,NAME=VALUE]", each set beside the actual step.

    Raises:
        ReplayDiffersError: the replay is not what was logged or saved (exit code 1).
        NonFiniteError: the step gives no finite loss or gradient, as in the run.
        LowlevelError: the run cannot be set up again.
    """
    if dump:
        check_target(dump)
    config = RunFolder(run_dir).read_config()
    others = [(text, parse_settings(config, text)) for text in settings]
    with deterministic_mode(config.train.deterministic):
        return _replay(run_dir, console, step, start, dump, layers, others)


def _replay(
    run_dir: Path,
    console: Console,
    step: int,
    start: int | None,
    dump: Path | None,
    layers: bool,
    others: Sequence[tuple[str, RunConfig]],
) -> Replay:
    session = open_session(run_dir, step, lines_to(console), start=start)
    seen: list[Dump] = []
    outcomes: list[Outcome] = []

    def before_last() -> None:
        if dump:
            seen.append(observe(session, layers=layers))
        if others:
            outcomes.extend(what_if(session, others))

    try:
        found = replay(session, step, before_last)
    except NonFiniteError as error:
        for one in seen:
            one.write(dump or Path())
        raise NonFiniteError(f"{error}; {examine_error(error, session.policy, session.method).sentence}") from None
    for one in seen:
        one.add_update(session)
        one.write(dump or Path())
    _print(found, session, console)
    if outcomes:
        console.print(_what_if_table(outcomes))
    if dump:
        console.print(f"step {step} written to {dump}: index.json says what each tensor is", markup=False)
    _judge(found)
    return found


def _judge(found: Replay) -> None:
    row = found.first_difference
    if row is None:
        return
    raise ReplayDiffersError(
        f"the replay first differs at step {row.step}, {row.quantity}: logged {row.logged}, replayed {row.replayed}, "
        f"largest difference {row.difference:.3g}"
    )


def _print(found: Replay, session: Session, console: Console) -> None:
    console.print(f"step {found.step} of {session.folder.path}, replayed from {found.start}", markup=False)
    own = [row for row in found.rows if row.step == found.step]
    earlier = [row for row in found.rows if row.step != found.step]
    if earlier:
        console.print(f"  before it: {_summary(earlier)}", markup=False)
    if own:
        console.print(_table(own))
    elif found.record:
        numbers = ", ".join(f"{k} {v:.6g}" for k, v in found.record.items() if k in ("loss", "grad_norm"))
        console.print(f"  replayed: {numbers} (means since the line before)", markup=False)
    for note in found.notes:
        console.print(f"  {note}", markup=False)
    if session.moved:
        console.print(
            f"  {session.moved}: numbers may differ by {NUMBERS:.0%} and tensors by {TENSORS:.0%} of their norm",
            markup=False,
        )
    elif found.first_difference:
        console.print(
            f"  bits also differ between versions of torch, CPUs and numbers of threads (here torch "
            f"{torch.__version__}, {torch.get_num_threads()} threads; the run: environment.json)",
            markup=False,
        )


def _summary(rows: Sequence[Row]) -> str:
    steps = sorted({row.step for row in rows})
    wrong = [row for row in rows if not row.good]
    span = f"logged step {steps[0]}" if len(steps) == 1 else f"{len(steps)} logged steps, {steps[0]} to {steps[-1]}"
    if wrong:
        return f"{span}: {len(wrong)} of {len(rows)} numbers differ, first {wrong[0].quantity} of step {wrong[0].step}"
    same = all(row.identical for row in rows)
    return f"{span}: {len(rows)} numbers, {'identical' if same else 'within the tolerance'}"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("quantity", overflow="fold")
    for name in ("logged", "replayed", "difference"):
        table.add_column(name, justify="right")
    table.add_column("identical")
    for row in rows:
        difference = "missing" if math.isinf(row.difference) else f"{row.difference:.3g}"
        answer = "yes" if row.identical else ("within tolerance" if row.good else "NO")
        table.add_row(row.quantity, row.logged, row.replayed, difference, answer)
    return table


def _what_if_table(outcomes: Sequence[Outcome]) -> Table:
    title = "the step alone, under other settings"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("quantity")
    for outcome in outcomes:
        table.add_column(outcome.settings, justify="right")
    for name in outcomes[0].numbers:
        table.add_row(name, *(f"{outcome.numbers[name]:.6g}" for outcome in outcomes))
    return table
