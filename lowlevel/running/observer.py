"""Receives what the loop of a run reports: metrics, checkpoints, status, the bar, the callbacks, and the first step.

In the first step of DPO or KTO with a fresh adapter B = 0, so the policy is its reference and every margin is exactly
0: both pass the same batch through the same layers and kernels. A base that is not deterministic, or another reference,
would train on wrong margins without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowlevel.checkpoints.checkpoint import checkpoints
from lowlevel.config.schema import RunConfig
from lowlevel.durable import append_line, sync
from lowlevel.errors import EVAL_LOSS, EVAL_REWARD, ConfigError
from lowlevel.methods.sampled import DIFFERENCE
from lowlevel.model.moving_reference import reads_reference
from lowlevel.optim.train_state import StepResult, TrainState
from lowlevel.running.callbacks import Callback
from lowlevel.running.job import Engine
from lowlevel.running.progress import TrainingProgress
from lowlevel.running.run_folder import RunFolder

MARGINS = "rewards/margins"
# Relative to the mean log-probability of a completion: about 100 roundings of fp32, 2 of fp16 and bf16.
BOUNDS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}
SAMPLER_BOUNDS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.6e-1}  # nats of a token; 3e-6 was seen on a CPU


@dataclass
class RunObserver:
    """Writes metrics, checkpoints and status, calls the callbacks, and passes signals on.

    Of several ranks, the first one does; the others only compare their weights with it.
    """

    folder: RunFolder
    progress_bar: TrainingProgress
    engine: Engine
    note: Callable[[str], None]
    callbacks: Sequence[Callback] = ()

    def log(self, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl, show, and pass to the callbacks."""
        if not self.engine.job.ranks.first:
            return
        append_line(self.folder.metrics, record)
        self.progress_bar.record(record)
        for callback in self.callbacks:
            (callback.on_evaluate if {EVAL_LOSS, EVAL_REWARD} & record.keys() else callback.on_log)(record)

    def progress(self, state: TrainState, result: StepResult) -> None:
        """Check the first step of a new run, move the bar, and pass the step to the callbacks."""
        config = self.engine.job.config
        if state.step == 1 and starts_as_reference(config):
            if line := check_first_step(result, config, self.engine.job.inputs.placement.precision):
                self.note(line)
        check_sampler(result, config, self.engine.job.inputs.placement.precision)
        self.progress_bar.step(state.step)
        for callback in self.callbacks:
            callback.on_step(result)

    def save(self, state: TrainState) -> None:
        """Sync the log's lines, write the checkpoint, then the status that names it."""
        if not self.engine.job.ranks.first:
            self.engine.write_checkpoint(state)
            return
        if self.folder.metrics.exists():  # no checkpoint survives a power cut that its log lines do not
            sync(self.folder.metrics)
        self.engine.write_checkpoint(state)
        self.folder.write_status("running", state.step)
        for callback in self.callbacks:
            callback.on_save(next(iter(checkpoints(self.folder.path))))

    def stop_requested(self) -> int:
        """The first signal received, on any rank, or 0."""
        return self.engine.job.ranks.stop_requested()


def check_sampler(result: StepResult, config: RunConfig, precision: str) -> None:
    """Raise ConfigError if the log-probabilities of sampler and trainer are apart by more than rounding in the mean, at
    the first step on a batch: the sampler has another policy. The largest difference is logged.
    """
    if config.sampled is None or (result.step - 1) % config.sampled.num_iterations:
        return
    apart, bound = result.means.get(f"{DIFFERENCE}/mean", 0.0), SAMPLER_BOUNDS[precision]
    if apart > bound:
        raise ConfigError(
            f"step {result.step}: log-probabilities of sampler and trainer differ by {apart:.2g} nats in the mean "
            f"(bound in {precision}: {bound:g}): these are two policies; report it"
        )


def starts_as_reference(config: RunConfig) -> bool:
    """Whether a new run's policy equals its reference at the start: no active dropout, and no lora.init_from."""
    fresh = config.active_dropout == 0 and config.lora.init_from is None
    return fresh and config.method in ("dpo", "kto") and reads_reference(config)


def all_ties(result: StepResult) -> bool:
    """Whether every margin and reward is exactly 0, or there are none; a tie counts one half."""
    ties = {"rewards/accuracies": 0.5}
    return all(value == ties.get(name, 0.0) for name, value in result.metrics.items() if name.startswith("rewards/"))


def check_first_step(result: StepResult, config: RunConfig, precision: str) -> str | None:
    """A warning if policy and reference differ by rounding; None if they are equal.

    `result`: of step 1 of a run that `starts_as_reference`. `precision` (fp32, fp16, bf16) chooses the bound. Raises
    ConfigError for a larger difference.
    """
    if all_ties(result):
        return None
    found = result.metrics
    margin, beta = found.get(MARGINS, 0.0), config.kto.beta if config.method == "kto" else config.dpo.beta
    logps = [(found[name.replace("ref_", "")], found[name]) for name in found if name.startswith("logps/ref_")]
    apart = max(abs(margin) / beta, *(abs(own - reference) for own, reference in logps))
    bound = BOUNDS[precision] * max(abs(reference) for _, reference in logps)
    what = (
        f"step 1: a fresh adapter's margins are not 0: mean {margin:.3g}; mean log-probabilities of policy and "
        f"reference differ by {apart:.3g}"
    )
    if apart <= bound:
        return f"warning: {what}, within rounding ({bound:.3g})"
    cache = "remove dpo.reference_cache, or " if config.dpo.reference_cache else ""
    raise ConfigError(
        f"{what} (bound {bound:.3g}): the policy does not start as its reference; nothing was saved; {cache}run "
        "lowlevel verify on the run file"
    )
