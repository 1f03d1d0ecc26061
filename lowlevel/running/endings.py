"""However a run ends, it ends with one error that has an exit code, and with a run-status.json that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from lowlevel.checkpoints.checkpoint import last_good
from lowlevel.errors import CheckpointError, ConfigError, InterruptedRunError, LowlevelError
from lowlevel.running.interrupts import Interrupts
from lowlevel.running.run_folder import RunFolder


@contextmanager
def one_error(folder: RunFolder, interrupts: Interrupts) -> Iterator[None]:
    """Signals and refusing disks inside become errors for people.

    Raises:
        InterruptedRunError: in the place of KeyboardInterrupt.
        CheckpointError: in the place of OSError, with its path, and of SafetensorError, which a full disk raises too.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise interrupts.error() from None
    except BrokenPipeError:  # standard output went away
        raise
    except (OSError, SafetensorError) as error:
        path, reason = folder.path, str(error)
        if isinstance(error, OSError):
            path, reason = error.filename2 or error.filename or path, error.strerror or reason
        lost = f"; {last_good(folder.path)}" if folder.holds_run() else ""
        raise CheckpointError(f"{path}: {reason}{lost}") from error


@contextmanager
def recorded_end(folder: RunFolder) -> Iterator[None]:
    """Record the exception that leaves the block in run-status.json. Enter it while holding the run's lock.

    A command that was refused (exit code 2) before it went on with a run leaves that run's status as it is.
    """
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, ConfigError) and folder.read_state() != "running"):
            state = "preempted" if isinstance(error, InterruptedRunError | GeneratorExit) else "failed"
            folder.write_end(state, *_code_and_text(error))
        raise


def _code_and_text(error: BaseException) -> tuple[int, str]:
    if isinstance(error, LowlevelError):
        return error.exit_code, str(error)
    if isinstance(error, SystemExit):
        return int(error.code or 0), "ended at once by a second signal"
    if isinstance(error, GeneratorExit):
        return 0, "the loop over its steps was left; continue with resume"
    if isinstance(error, BrokenPipeError):
        return 130, "standard output was closed"
    return 1, f"{type(error).__name__}: {error}"
