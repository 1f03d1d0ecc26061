"""Saving a step that has a good checkpoint already, in a process that may be killed in it; no training."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faulting.operations import Record
from benchmarks.faulting.processes import Fault, start_server


@dataclass(frozen=True)
class Saved:
    """Exit code, and what was changed in the folder."""

    code: int
    changes: Sequence[str]


def save_again(folder: Path, fault: Fault | None, *, restore: bool = False) -> Saved:
    """Save step 1 twice, the second time with `fault`; with `restore` only do what every start does first."""
    start_server()
    log = folder.parent / f"{folder.name}.operations"
    faults = [fault] if fault else [Record(log)]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_restore if restore else _save, args=(folder, faults))
    process.start()
    process.join()
    code = process.exitcode
    assert code is not None
    return Saved(code, [] if fault else Record(log).read())


def _save(folder: Path, faults: Sequence[Fault]) -> None:
    import torch
    from safetensors.torch import save_file

    from lowlevel.checkpoints import training_state
    from lowlevel.checkpoints.checkpoint import save_checkpoint, verify

    def write(to: Path) -> None:
        training_state.save_file({"a": torch.arange(5000.0)}, to / "adapter_model.safetensors")
        (to / "adapter_config.json").write_text("{}")

    assert training_state.save_file is save_file
    folder.mkdir(parents=True)
    verify(save_checkpoint(folder, 1, write, {"state": {}, "identity": {}}, keep=1))
    for fault in faults:
        fault.install(folder)
    save_checkpoint(folder, 1, write, {"state": {}, "identity": {}}, keep=1)


def _restore(folder: Path, faults: Sequence[Fault]) -> None:
    from lowlevel.checkpoints.checkpoint import remove_litter
    from lowlevel.running.run_folder import run_lock

    for fault in faults:
        fault.install(folder)
    with run_lock(folder):
        remove_litter(folder)
