"""How a run begins: the checks before its folder is made, the checkpoint that it continues from, and its state."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lowlevel.checkpoints.checkpoint import checkpoints, newest_verified, remove, verify
from lowlevel.checkpoints.tables import drop_after
from lowlevel.checkpoints.training_state import restore_state
from lowlevel.config.schema import RunConfig
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.adapters import adapter_sha256, weights_file
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.train_state import TrainState
from lowlevel.ranks import ALONE, Ranks
from lowlevel.running.adapter_sources import check_bases, notes_of_sources, notes_of_templates
from lowlevel.running.assembly import Inputs, check_run, read_merged_adapter, with_merged_base
from lowlevel.running.callbacks import Callback
from lowlevel.running.job import Job
from lowlevel.running.progress import lines_to
from lowlevel.running.resuming import check_differences, differences, is_written, read_changes, recorded_changes
from lowlevel.running.run_folder import RunFolder
from lowlevel.running.run_record import write_start

Checkpoint = tuple[Path, dict[str, Any]]  # its folder and its manifest


@dataclass(frozen=True)
class Start:
    """What the user asks for in addition to the configuration.

    Attributes:
        ranks: the processes that share the run; the first one checks the folder and writes.
        resume: continue from the newest verified checkpoint.
        restart: discard the run that the folder holds.
        allow_change: keys that may differ from that checkpoint (resuming.py).
        callbacks: called at the moments that `Callback` names.
        details: add the values of each example and token to the results of steps.
    """

    folder: RunFolder
    console: Console
    ranks: Ranks = ALONE
    resume: bool = False
    restart: bool = False
    allow_change: Sequence[str] = ()
    callbacks: Sequence[Callback] = ()
    details: bool = False

    def note(self, line: str) -> None:
        """Print a line without rich's markup."""
        self.console.print(line, markup=False)

    def check_folder(self) -> None:
        """Refuse contradicting options, a file, a run without one, and what a run would replace. Raises ConfigError."""
        if self.resume and self.restart:
            raise ConfigError("--resume continues a run and --restart discards it: give one of them")
        if self.allow_change and not self.resume:
            raise ConfigError("--allow-change needs --resume, which compares a run with its checkpoint")
        if self.folder.path.is_file():
            raise ConfigError(f"train.output_dir {self.folder.path} is a file, expected the name of a folder")
        if not self.folder.holds_run():
            for path in filter(Path.exists, (self.folder.adapter, self.folder.stacked)):
                raise ConfigError(f"{path} is not from a run, which would replace it: set another train.output_dir")
        elif not (self.resume or self.restart):
            raise ConfigError(
                f"{self.folder.path} holds a run: add --resume to continue it, --restart to discard it, or set "
                "train.output_dir"
            )

    def prepare(self, config: RunConfig) -> tuple[RunConfig, Inputs]:
        """The configuration with its memory plan, and the inputs. Raises ConfigError, DataError, CheckpointError."""
        if not self.resume:
            self._check_apart(config)
        config, inputs = check_run(self.folder.resolved(config), self.ranks)
        if (cache := config.dpo.reference_cache) is not None:
            try:
                Path(cache).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"dpo.reference_cache: {cache} cannot be created: {error.strerror}") from None
        if Path(config.model.name) == self.folder.base:
            inputs = replace(inputs, merged_adapter=read_merged_adapter(self.folder))
        return config, inputs

    def _check_apart(self, config: RunConfig) -> None:
        """Refuse a run folder that also holds what the run starts from: base and run would overwrite each other."""
        own = self.folder.path.resolve()
        adapters = {"model.adapter": config.model.adapter, "lora.init_from": config.lora.init_from}
        for key, name in {"model.name": config.model.name, **adapters}.items():
            place = Path(name).resolve() if name and Path(name).is_dir() else None
            if place and (place == own or key in adapters and self.restart and place.is_relative_to(own)):
                what = f"train.output_dir {self.folder.path} is the folder of {key}"
                raise ConfigError(f"{what}: give the run a folder of its own")

    def merge_base(self, config: RunConfig, inputs: Inputs) -> tuple[RunConfig, Inputs]:
        """For adapter_mode "original": the merged base in the run folder becomes the run's base."""
        if config.model.adapter_mode == "original":
            sources = {"model.adapter": inputs.parent}
            for line in [*notes_of_sources(config, sources), *check_bases(sources, {"name": config.model.name})]:
                self.note(f"note: {line}")
        return with_merged_base(config, inputs, self.folder)

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint to continue from; None for a new run or one without checkpoints. Raises CheckpointError."""
        if not self.resume:
            return None
        found = newest_verified(self.folder.path, lines_to(self.console))
        if found is None:
            if self.allow_change:
                raise ConfigError(f"--allow-change: {self.folder.path} has no checkpoint")
            self.note("no checkpoint yet: starting from step 0")
        return found

    def begin(self, job: Job, found: Checkpoint | None) -> TrainState:
        """The state of a new run or of the checkpoint; writes the files that describe the run.

        Raises ConfigError, DataError: the run differs from the checkpoint's and --allow-change does not permit it, or
        continuing would lose a result.
        """
        sources = {"model.adapter": job.inputs.parent, "lora.init_from": job.inputs.init_from}
        notes = [*notes_of_sources(job.config, sources), *check_bases(sources, job.manifest["base"])]
        for line in [*notes, *notes_of_templates(sources, job.manifest["chat_template_sha256"])]:
            self.note(f"note: {line}")
        if not self.ranks.first:
            return _restored(job, found)
        if found is None:
            check_result_is_saved(self.folder)
            write_start(self.folder, job, 0)
            _drop_later(self.folder, -1)  # written by a run that ended before its first checkpoint
            return _restored(job, None)
        return self._continue(job, found)

    def _continue(self, job: Job, found: Checkpoint) -> TrainState:
        folder, step = self.folder, found[1]["step"]
        later = read_changes(folder, since=step)
        saved = folder.read_config()
        changes = differences(saved, found[1], job.config, job.manifest, job.origin["versions"], later)
        check_differences(changes, self.allow_change, step, folder, job.inputs.data)
        written = not changes and is_written(folder, job.config, job.manifest)
        written = written and job.ranks.size == 1  # environment.json has the number of several
        state = _restored(job, found)
        if state.step < job.total_steps and not state.stopped_early:
            check_result_is_saved(folder)
            folder.write_status("running", state.step)
            remove_result(folder)
        for change in changes:
            self.note(f"allowed: {change}")
        with recorded_changes(folder, step, changes):
            if written:
                folder.write_status("running", step)
            else:
                write_start(folder, job, step)
        _drop_later(folder, state.step)
        self.note(f"resumed from {found[0].name}")
        return state


def _restored(job: Job, found: Checkpoint | None) -> TrainState:
    """The state of the checkpoint, whose weights and optimizer state are loaded, or of a new run."""
    if found is None:
        return TrainState(LossScale.for_precision(job.inputs.placement.precision))
    state = restore_state(job.policy, job.optimizer, *found)
    state.judge_patience(job.config.train.early_stopping_patience)  # --allow-change may have changed it
    return state


def _drop_later(folder: RunFolder, step: int) -> None:
    """Remove what an earlier start wrote about steps after `step`."""
    folder.drop_metrics_after(step)
    drop_after(folder.trace, step)
    drop_after(folder.rollouts, step)
    shutil.rmtree(folder.failure, ignore_errors=True)


def check_result_is_saved(folder: RunFolder) -> None:
    """Refuse to continue if no checkpoint holds the weights of `adapter/`, which would be lost. Raises ConfigError."""
    file = weights_file(folder.adapter)
    if not (folder.adapter / file).exists():
        return
    sha256 = adapter_sha256(folder.adapter)
    for path in checkpoints(folder.path):
        try:
            if verify(path)["files"][file]["sha256"] == sha256:
                return
        except CheckpointError:
            continue
    raise ConfigError(
        f"{folder.adapter} holds a result that is in no usable checkpoint, so continuing would lose it: move it away "
        "to continue without it; --restart discards it"
    )


def remove_result(folder: RunFolder) -> None:
    """Remove the results of a finished run that is being continued: `adapter/` lacks the steps to come.

    Call it before any file says that the run has other settings. If the process is killed in here, the run has all its
    steps and a part of its result: the next start writes the result again, or removes it again.
    """
    for name in ("summary.json", "loss.png"):
        (folder.path / name).unlink(missing_ok=True)
    for path in (folder.stacked, folder.adapter):
        remove(path)
