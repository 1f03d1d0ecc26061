"""Which weights are inspected: those before a step, a checkpoint's, or the final adapter; and how to say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowlevel.checkpoints.checkpoint import checkpoint_at, newest_good, saved, step_of
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.running.run_folder import RunFolder


@dataclass(frozen=True)
class Weights:
    """An adapter, and what to call it."""

    adapter: Path | None  # PEFT folder; None: as the run initialised it
    line: str


def choose_weights(folder: RunFolder, step: int | None, checkpoint: int | None, warn: Callable[[str], None]) -> Weights:
    """The weights for optimizer step `step` (counted from 1), or for a row.

    Args:
        folder: the run.
        step: None for a row: the final adapter then, or the newest checkpoint of an unfinished run.
        checkpoint: applied steps of the checkpoint to take instead; 0 for the adapter as it was initialised.
        warn: takes a line for each damaged checkpoint that is passed over.

    Raises:
        ConfigError: no such checkpoint, or nothing saved yet.
        CheckpointError: the checkpoint that was named is damaged, or all that could be taken.
    """
    if checkpoint is not None:
        return _of_checkpoint(folder, checkpoint, step)
    if step == 1:
        return _initial(step)
    if step is not None:
        return _before(folder, step, warn)
    last = _last(folder, warn)
    if last is None:
        raise _nothing_saved(folder)
    return last


def last_weights(folder: RunFolder, warn: Callable[[str], None]) -> Weights:
    """The final adapter, or of an unfinished run its newest checkpoint that verifies; `warn` hears of damaged ones.

    Raises:
        ConfigError: nothing saved yet.
        CheckpointError: every checkpoint is damaged.
    """
    last = _last(folder, warn)
    if last is None:
        raise ConfigError(f"{folder.path} has saved no weights yet: set train.save_steps, or wait until the run ends")
    return last


def _last(folder: RunFolder, warn: Callable[[str], None]) -> Weights | None:
    adapter = folder.newest_adapter(warn)
    if adapter is None or adapter == folder.adapter:
        return Weights(adapter, "final adapter") if adapter else None
    return Weights(adapter, f"{adapter.name}, the newest checkpoint (the run has no final adapter yet)")


def _before(folder: RunFolder, step: int, warn: Callable[[str], None]) -> Weights:
    """The newest good checkpoint before a step, or the final adapter where none is left."""
    found = newest_good(folder.path, warn, before=step)
    if found:
        return Weights(found[0], f"{found[0].name}{_relation(step_of(found[0]), step)}")
    if folder.adapter.exists():
        return Weights(folder.adapter, f"final adapter (no checkpoint at or before step {step - 1} is left)")
    if any(number < step for number in saved(folder.path)):
        raise CheckpointError(
            f"{folder.path}: no usable checkpoint before step {step}; --checkpoint 0 takes the weights it began with"
        )
    raise _nothing_saved(folder)


def _nothing_saved(folder: RunFolder) -> ConfigError:
    return ConfigError(f"{folder.path} has saved no weights to inspect yet; --checkpoint 0 takes those it began with")


def _of_checkpoint(folder: RunFolder, number: int, step: int | None) -> Weights:
    """The checkpoint that a person named."""
    if number == 0:
        return _initial(step)
    try:
        path, _ = checkpoint_at(folder.path, number, "--checkpoint")
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
