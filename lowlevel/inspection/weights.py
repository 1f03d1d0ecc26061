"""Which weights are inspected: those before a step, a checkpoint's, or the final adapter; and how to say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowlevel.checkpoints.checkpoint import checkpoints, newest_verified, verify
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.running.run_folder import RunFolder


@dataclass(frozen=True)
class Weights:
    """An adapter, and what to call it."""

    adapter: Path | None  # PEFT folder; None: as the run initialised it
    line: str


def choose_weights(folder: RunFolder, step: int | None, checkpoint: int | None) -> Weights:
    """The weights for optimizer step `step` (counted from 1), or for a row.

    Args:
        folder: the run.
        step: None for a row: the final adapter then, or the newest checkpoint of an unfinished run.
        checkpoint: applied steps of the checkpoint to take instead; 0 for the adapter as it was initialised.

    Raises:
        ConfigError: no such checkpoint, or nothing saved yet.
        CheckpointError: a checkpoint that is damaged.
    """
    saved = {_steps(path): path for path in checkpoints(folder.path)}
    if checkpoint is not None:
        return _of_checkpoint(folder, saved, checkpoint, step)
    if step == 1:
        return _initial(step)
    earlier = [number for number in saved if step is not None and number < step]
    if earlier:
        return _of_checkpoint(folder, saved, max(earlier), step)
    if folder.adapter.exists():
        why = "" if step is None else f" (no checkpoint at or before step {step - 1} is left)"
        return Weights(folder.adapter, f"final adapter{why}")
    if saved and step is None:
        newest = _of_checkpoint(folder, saved, max(saved), step)
        return Weights(newest.adapter, f"{newest.line}, the newest checkpoint (the run has no final adapter yet)")
    raise ConfigError(f"{folder.path} has saved no weights to inspect yet; --checkpoint 0 takes those it began with")


def last_weights(folder: RunFolder, warn: Callable[[str], None]) -> Weights:
    """The final adapter, or of an unfinished run its newest checkpoint that verifies; `warn` hears of damaged ones.

    Raises:
        ConfigError: nothing saved yet.
        CheckpointError: every checkpoint is damaged.
    """
    if folder.adapter.exists():
        return Weights(folder.adapter, "final adapter")
    found = newest_verified(folder.path, warn)
    if found is None:
        raise ConfigError(f"{folder.path} has saved no weights yet: set train.save_steps, or wait until the run ends")
    return Weights(found[0], f"{found[0].name}, the newest checkpoint (the run has no final adapter yet)")


def _of_checkpoint(folder: RunFolder, saved: dict[int, Path], number: int, step: int | None) -> Weights:
    if number == 0:
        return _initial(step)
    if number not in saved:
        known = ", ".join(map(str, sorted(saved))) or "none"
        raise ConfigError(f"{folder.path} has no checkpoint of step {number}; there are: {known}, and 0 for the start")
    path = saved[number]
    try:
        verify(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; choose another checkpoint with --checkpoint") from None
    return Weights(path, f"{path.name}{_relation(number, step)}")


def _initial(step: int | None) -> Weights:
    relation = _relation(0, step) if step is not None else ", before the first step"
    return Weights(None, f"adapter as initialised{relation}")


def _relation(number: int, step: int | None) -> str:
    """How a checkpoint stands to the step that is inspected."""
    if step is None:
        return ""
    if number + 1 == step:
        return f", the weights before step {step}"
    if number < step:
        return f", {step - 1 - number} {'update' if step - number == 2 else 'updates'} before step {step} began"
    return f", trained on step {step} already"


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
