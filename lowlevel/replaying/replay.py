"""Running a session to a step, and what was logged and saved on the way beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from lowlevel.checkpoints.checkpoint import saved, verify
from lowlevel.errors import CheckpointError, LowlevelError
from lowlevel.model.adapters import WEIGHTS, adapter_parameters
from lowlevel.model.policy import TRAINED
from lowlevel.optim.optimizer import optimizer_tensors
from lowlevel.replaying.compare import Row, first_difference, number_rows, tensors_row
from lowlevel.replaying.session import Session


class ReplayDiffersError(LowlevelError):
    """A replay that is not what the run wrote down; exit code 1."""


@dataclass
class Replay:
    """What a replay found. `rows` are in the order of steps."""

    step: int
    start: str
    exact: bool  # bit for bit; else within the tolerances of lowlevel.replaying.compare
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be compared, and why
    record: dict[str, Any] = field(default_factory=dict)  # means over the step's window, as the loop logs them

    @property
    def first_difference(self) -> Row | None:
        """Where the replay first leaves the run, or None."""
        return first_difference(self.rows)


def replay(session: Session, step: int, before_last: Callable[[], None] = lambda: None) -> Replay:
    """Take the steps to `step` and compare what is logged on the way.

    Args:
        session: as opened for `step`.
        step: counted from 1.
        before_last: called with the weights before step `step`.

    Raises:
        NonFiniteError: a step stops here as it stopped the run.
    """
    exact = session.moved is None
    found = Replay(step, session.start, exact)
    logged = {record["step"]: record for record in session.folder.read_metrics() if "loss" in record}
    while session.state.step < step:
        if session.state.step == step - 1:
            before_last()
        rate = session.rate()
        session.advance()
        number = session.state.step
        if number in logged or number == step:  # a window ends where the run logged a line
            record = session.close_window(rate)
            if number in logged:
                found.rows += number_rows(number, logged[number], record, exact=exact)
            found.record = record
    if step not in logged:
        found.notes.append(_unlogged(step, sorted(logged)))
    found.rows += _saved_rows(session, step, found)
    return found


def _unlogged(step: int, logged: list[int]) -> str:
    later = next((number for number in logged if number > step), None)
    if later is None:
        return f"step {step} is not in metrics.jsonl: its loss and metrics have nothing to be compared with"
    first = max((number for number in logged if number < step), default=0) + 1
    return (
        f"step {step} was not logged by itself: the line of step {later} has the means of steps {first} to {later}; "
        f"--step {later} compares them"
    )


def _saved_rows(session: Session, step: int, found: Replay) -> list[Row]:
    """Weights and optimizer state after the update, beside a checkpoint of the step and the final adapter."""
    rows = []
    weights = {name: p.detach() for name, p in adapter_parameters(session.policy.model, TRAINED).items()}
    path = saved(session.folder.path).get(step)
    if path:
        try:
            verify(path)
        except CheckpointError as error:
            found.notes.append(f"damaged: {error}")
        optimizer = optimizer_tensors(session.optimizer)
        for what, file, own in (("adapter", WEIGHTS, weights), ("optimizer", "optimizer.safetensors", optimizer)):
            rows.append(_file_row(step, f"{path.name} {what}", path / file, own, found.exact))
    else:
        found.notes.append(f"there is no checkpoint of step {step}: the update is compared by what follows from it")
    final = session.folder.adapter / WEIGHTS
    if final.exists() and _last_step(session) == step:
        rows.append(_file_row(step, "final adapter", final, weights, found.exact))
    return rows


def _file_row(step: int, what: str, path: Path, own: dict[str, Any], exact: bool) -> Row:
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        return Row(step, f"{what} ({error})", "unreadable", f"{len(own)} tensors", float("inf"), False, False)
    return tensors_row(step, what, saved, own, exact=exact)


def _last_step(session: Session) -> int:
    return max((record["step"] for record in session.folder.read_metrics() if "loss" in record), default=0)
