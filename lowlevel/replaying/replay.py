"""Replaying a run to a step, and comparing it with what was logged and saved on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from lowlevel.checkpoints.checkpoint import saved, verify
from lowlevel.determinism import deterministic_mode
from lowlevel.durable import check_new
from lowlevel.errors import CheckpointError, NonFiniteError
from lowlevel.heartbeat import counted
from lowlevel.model.adapters import adapter_parameters, weights_file
from lowlevel.model.policy import TRAINED
from lowlevel.optim.optimizer import optimizer_tensors
from lowlevel.replaying.compare import Row, number_rows, tensors_row
from lowlevel.replaying.dump import Dump, observe
from lowlevel.replaying.report import Replay
from lowlevel.replaying.session import Outcome, Session, open_session, parse_settings, what_if
from lowlevel.running.forensics import examine_error
from lowlevel.running.reopening import Reopened


def replay_run(
    opened: Reopened,
    step: int,
    *,
    start: int | None = None,
    dump: Path | None = None,
    layers: bool = False,
    settings: Sequence[str] = (),
) -> Replay:
    """Take a step of a run again and compare it with the log. Nothing is written into the run folder.

    Args:
        opened: the run, from `lowlevel.running.reopening.reopen`: finished, stopped or still training.
        step: optimizer step, counted from 1 as in the log.
        start: start from the checkpoint after this many steps; None: the newest one before the step.
        dump: new folder for every intermediate of the step.
        layers: dump the outputs of the decoder layers too.
        settings: "NAME=VALUE[,NAME=VALUE]": take the step under each of these settings as well.

    Raises:
        NonFiniteError: loss or gradient of the step are NaN or infinite, as in the run.
        LowlevelError: the run cannot be set up again.
    """
    if dump:
        check_new(dump)
    others = [(text, parse_settings(opened.config, text)) for text in settings]
    dumps: list[Dump] = []
    outcomes: list[Outcome] = []
    with deterministic_mode(opened.config.train.deterministic):
        session = open_session(opened, step, start=start)

        def before_last() -> None:
            if dump:
                dumps.append(observe(session, layers=layers))
            if others:
                outcomes.extend(what_if(session, others))

        try:
            found = replay(session, step, before_last)
        except NonFiniteError as error:
            for one in dumps:
                one.write(dump or Path())
            raise NonFiniteError(f"{error}; {examine_error(error, session.policy, session.method).sentence}") from None
        for one in dumps:
            one.add_update(session)
            one.write(dump or Path())
    found.outcomes = outcomes
    return found


def replay(session: Session, step: int, before_last: Callable[[], None] = lambda: None) -> Replay:
    """Take the steps up to `step`, counted from 1, and compare the numbers that are logged on the way.

    `before_last` is called with the weights before that step. Raises NonFiniteError as the run did.
    """
    found = Replay(step, session.start, session.moved)
    logged = {record["step"]: record for record in session.folder.read_metrics() if "loss" in record}
    for _ in counted("replaying", range(session.state.step, step), "steps"):
        if session.state.step == step - 1:
            before_last()
        rate = session.rate()
        session.advance()
        number = session.state.step
        if number in logged or number == step:  # a window ends where the run logged a line
            record = session.state.close_window(rate, number / session.order.steps_per_epoch)
            if number in logged:
                found.rows += number_rows(number, logged[number], record, exact=found.exact)
            found.record = record
    if step not in logged:
        found.notes.append(_unlogged(step, sorted(logged)))
    found.rows += _saved_rows(session, step, found)
    return found


def _unlogged(step: int, logged: list[int]) -> str:
    later = next((number for number in logged if number > step), None)
    if later is None:
        return f"step {step} is not in metrics.jsonl: its loss and metrics cannot be compared"
    first = max((number for number in logged if number < step), default=0) + 1
    return (
        f"step {step} has no log line of its own: the line of step {later} has the means of steps {first} to {later}; "
        f"--step {later} compares them"
    )


def _saved_rows(session: Session, step: int, found: Replay) -> list[Row]:
    """Weights and optimizer state after the update against a checkpoint of the step, and the final adapter."""
    rows = []
    weights = {name: p.detach() for name, p in adapter_parameters(session.policy.model, TRAINED).items()}
    path = saved(session.folder.path).get(step)
    if path:
        try:
            verify(path)
        except CheckpointError as error:
            found.notes.append(f"damaged: {error}")
        optimizer = optimizer_tensors(session.optimizer)
        for what, file, own in (
            ("adapter", weights_file(path), weights),
            ("optimizer", "optimizer.safetensors", optimizer),
        ):
            rows.append(_file_row(step, f"{path.name} {what}", path / file, own, found.exact))
    else:
        found.notes.append(f"no checkpoint of step {step}: its update is compared only through later steps")
    final = session.folder.adapter / weights_file(session.folder.adapter)
    last = max((record["step"] for record in session.folder.read_metrics() if "loss" in record), default=0)
    if final.exists() and last == step:
        rows.append(_file_row(step, "final adapter", final, weights, found.exact))
    return rows


def _file_row(step: int, what: str, path: Path, own: dict[str, Any], exact: bool) -> Row:
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        return Row(step, f"{what} ({error})", "unreadable", f"{len(own)} tensors", float("inf"), False, False)
    return tensors_row(step, what, saved, own, exact=exact)
