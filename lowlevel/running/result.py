"""What a run wrote at its end, when the run goes on: `adapter/` must not be taken for the result of steps to come."""

from __future__ import annotations

from lowlevel.checkpoints.checkpoint import checkpoints, remove, verify
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.adapters import WEIGHTS, adapter_sha256
from lowlevel.running.run_folder import RunFolder


def check_result_is_saved(folder: RunFolder) -> None:
    """Refuse to go on where a checkpoint does not hold what `adapter/` holds: its weights would be lost.

    Raises:
        ConfigError: with what to do.
    """
    if not (folder.adapter / WEIGHTS).exists():
        return
    sha256 = adapter_sha256(folder.adapter)
    for path in checkpoints(folder.path):
        try:
            if verify(path)["files"][WEIGHTS]["sha256"] == sha256:
                return
        except CheckpointError:
            continue
    raise ConfigError(
        f"{folder.adapter} holds a result that no usable checkpoint has, so going on would lose it: move it away to go "
        "on without it; --restart discards it"
    )


def remove_result(folder: RunFolder) -> None:
    """Remove what the end of a run wrote, and what follows from it.

    Call it before anything says that the run has other settings. A process killed in here leaves a run that has taken
    its steps and has not written all of its result: the next start writes it again, or comes here again.
    """
    for name in ("summary.json", "loss.png"):
        (folder.path / name).unlink(missing_ok=True)
    for path in (folder.stacked, folder.adapter):
        remove(path)
