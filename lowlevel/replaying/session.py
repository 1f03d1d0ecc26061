"""A run set up again at a checkpoint, and taken further step by step, also under other settings.

Nothing is written and no lock is taken: the run may still be training.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.order import DataOrder
from lowlevel.checkpoints.checkpoint import checkpoint_at, newest_good
from lowlevel.checkpoints.training_state import restore_state
from lowlevel.config import METHODS
from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.schema import SECTIONS, RunConfig
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.execution import Eager, Execution, WithFallback
from lowlevel.loop import optimizer_step
from lowlevel.methods import Method
from lowlevel.methods.choice import build_method, check_loss
from lowlevel.model.dequantised import dequantize_as_set
from lowlevel.model.policy import Policy
from lowlevel.online.steps import step_batches
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from lowlevel.optim.train_state import StepResult, TrainState
from lowlevel.running.assembly import Inputs, choose_execution, identity
from lowlevel.running.reopening import Reopened, kept_rollouts, step_examples
from lowlevel.running.run_folder import RunFolder


@dataclass
class Session:
    """A run at a step boundary. `state.step` updates were applied to the policy's weights."""

    folder: RunFolder
    config: RunConfig
    inputs: Inputs
    policy: Policy
    method: Method
    optimizer: torch.optim.Optimizer
    execution: Execution
    order: DataOrder
    state: TrainState
    start: str  # the checkpoint's name, or "the start"
    moved: str | None  # why numbers may differ from the run's in their last bits, or None

    @property
    def compiled(self) -> bool:
        """Whether the layers run compiled in this session's steps."""
        return isinstance(self.execution, WithFallback) and self.execution.mode != "eager"

    def batches(self, step: int, method: Method | None = None) -> list[PackedBatch]:
        """The micro-batches of the step after `step` updates."""
        own, run_dir = method or self.method, self.folder.path
        if self.config.sampled:
            return step_batches(self.config, own, kept_rollouts(self.config, run_dir, step + 1))
        return own.micro_batches(step_examples(self.config, self.inputs.data, step + 1))

    def rate(self, config: RunConfig | None = None) -> float:
        """The learning rate of the coming step."""
        total_steps = self.order.total_steps(self.config.train)
        return learning_rate(self.state.step, total_steps, (config or self.config).train)

    def advance(self) -> StepResult:
        """Take one step, as `lowlevel.loop.train` does. Raises NonFiniteError as in training."""
        started = time.perf_counter()
        result = take_step(self, self.config, self.execution, self.state.loss_scale)
        self.state.record(result, time.perf_counter() - started)
        self.policy.move_reference(self.state.step)
        return result


def take_step(session: Session, config: RunConfig, execution: Execution, scale: LossScale) -> StepResult:
    """One update with the learning rate and clipping of `config` and the loss of `execution`; `state` stays."""
    set_learning_rate(session.optimizer, session.rate(config))
    return optimizer_step(
        execution,
        session.optimizer,
        session.batches(session.state.step, execution.method),
        scale,
        seed=config.train.seed,
        step=session.state.step,
        max_grad_norm=config.train.max_grad_norm,
    )


def open_session(opened: Reopened, step: int, *, start: int | None = None) -> Session:
    """Set a run up at the newest verified checkpoint before step `step`, counted from 1, or at its start.

    `start`: from the checkpoint after this many steps instead; 0: from the start of the run.

    Raises:
        ConfigError: no such step or checkpoint.
        DataError: the rows are not those of the run.
        CheckpointError: base, adapters, loss or checkpoint are not those of the run, or damaged.
    """
    config, note = opened.config, opened.note
    opened.method()  # refuses another loss before anything is loaded
    if start is not None and start >= step:
        raise ConfigError(f"--from {start}: a replay of step {step} starts before it")
    inputs = opened.inputs()
    method = opened.method(inputs.data.train)
    step_examples(config, inputs.data, step, run_dir=opened.folder.path)  # refuses a step beyond the run's last
    policy = opened.policy(training=True)
    _check_identity(opened, identity(config, inputs, policy, opened.manifest["base"]["sha256"]))
    optimizer = build_optimizer(policy.flat.weights, config.train, policy.flat.parts)
    state = TrainState(LossScale.for_precision(inputs.placement.precision))
    found: tuple[Path, dict[str, Any]] | None = None  # the start of the run
    if start is None:
        found = newest_good(opened.folder.path, note, before=step)
    elif start:
        found = checkpoint_at(opened.folder.path, start, "--from")
    if found:
        try:
            state = restore_state(policy, optimizer, *found)
        except OSError as error:  # a run that is still training deletes old checkpoints
            raise CheckpointError(f"{found[0]} went away while it was read ({error.strerror}); try again") from None
        _check_identity(opened, found[1]["identity"])
    dequantize_as_set(policy, config.train.dequantize_once)
    return Session(
        folder=opened.folder,
        config=config,
        inputs=inputs,
        policy=policy,
        method=method,
        optimizer=optimizer,
        execution=WithFallback(policy, method, choose_execution(config, inputs), note),
        order=DataOrder.of(config, inputs.data.train),
        state=state,
        start=found[0].name if found else "the start of the run",
        moved=opened.moved,
    )


def _check_identity(opened: Reopened, found: dict[str, Any]) -> None:
    """Refuse rows, tokenizer, order or, in a checkpoint, anything else that is not the run's.

    The base was checked by its hash, which differs in another precision.
    """
    expected, other = dict(opened.manifest), dict(found)
    other["base"] = {key: found["base"].get(key) for key in expected["base"]}  # older manifests lack "prequantised"
    for side in (expected, other):
        side.pop("attention", None)
        side.pop("reward_sha256", None)  # the kept completions have their rewards
    if expected["base"]["dtype"] != found["base"]["dtype"]:
        for side in (expected, other):
            side["base"] = {key: value for key, value in side["base"].items() if key not in ("sha256", "dtype")}
    changed = [key for key in expected if expected[key] != other.get(key)]
    if changed:
        raise CheckpointError(f"{opened.folder.path}: {', '.join(changed)} differ from its manifest")


TRAIN_KEYS = ("learning_rate", "max_grad_norm")
NOT_OF_A_STEP = ("reference_cache", "loss_kwargs", "ref_model_sync_steps", "ref_model_mixup_alpha")
LOSS_KEYS = {  # settings of a step by method
    method: tuple(name for name in SECTIONS[method].model_fields if name not in NOT_OF_A_STEP) for method in METHODS
}


@dataclass(frozen=True)
class Outcome:
    """Numbers of a step under some settings."""

    settings: str
    numbers: dict[str, float]  # loss, metrics, grad_norm, cosine to the actual gradient, learning_rate, update_norm


def parse_settings(config: RunConfig, text: str) -> RunConfig:
    """The configuration changed by "beta=0.3", "loss_type=ipo,beta=0.2" or "loss_kwargs.gamma=2".

    Raises ConfigError for a key that is not a setting of one step, and for a value that a run file refuses.
    """
    tables, method = to_tables(config), config.method
    for part in text.split(","):
        key, equals, value = part.partition("=")
        name = key.strip().removeprefix(f"{method}.").removeprefix("train.")
        keys = LOSS_KEYS[method]
        _, is_kwarg, kwarg = name.partition("loss_kwargs.")
        if not equals or not (name in (*TRAIN_KEYS, *keys) or is_kwarg):
            other = next((other for other in METHODS if name in LOSS_KEYS[other]), None)
            if other and equals:
                raise ConfigError(f"--what-if {text}: {name} is a setting of {other}, and the run is {method}")
            known = ", ".join([*TRAIN_KEYS, *keys, *["loss_kwargs.KEY"] * ("loss_type" in keys)])
            raise ConfigError(f"--what-if {text}: expected NAME=VALUE, NAME one of {known}")
        section = "train" if name in TRAIN_KEYS else method
        given, new = tables.get(section, {}), _value(value.strip())
        update = {"loss_kwargs": {**given.get("loss_kwargs", {}), kwarg: new}} if is_kwarg else {name: new}
        tables[section] = {**given, **update}
    changed = config_from_tables(tables, f"--what-if {text}")
    try:
        check_loss(changed)
    except ConfigError as error:
        raise ConfigError(f"--what-if {text}: {error}") from None
    return changed


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def what_if(session: Session, settings: Sequence[tuple[str, RunConfig]]) -> list[Outcome]:
    """The next step with the run's settings, then with each of the others; weights, state and counters stay.

    Raises NonFiniteError if a loss or gradient is NaN or infinite.
    """
    outcomes: list[Outcome] = []
    actual: Tensor | None = None
    for name, config in [("actual", session.config), *settings]:
        numbers, gradient = _outcome(session, config)
        actual = gradient if actual is None else actual
        numbers["cosine"] = float(torch.nn.functional.cosine_similarity(gradient, actual, dim=0))
        outcomes.append(Outcome(name, numbers))
    return outcomes


def _outcome(session: Session, config: RunConfig) -> tuple[dict[str, float], Tensor]:
    """Take the step and undo it. Clipping only scales the gradient, so it does not change the cosine."""
    weights, optimizer = session.policy.flat.weights, session.optimizer
    before, state = weights.detach().clone(), optimizer_tensors(optimizer)
    method = build_method(config, session.inputs.attention, session.inputs.data.train)
    execution = Eager(session.policy, method)
    session.policy.layers.use(compiled=False)
    scale = deepcopy(session.state.loss_scale)
    try:
        result = take_step(session, config, execution, scale)
        gradient = session.policy.flat.grad.double()
        update = float((weights.detach() - before).double().norm())
    finally:
        with torch.no_grad():
            weights.copy_(before)
        if state:
            load_optimizer_tensors(optimizer, state)
        else:
            optimizer.state.clear()
        session.policy.layers.use(compiled=session.compiled)
    rate = session.rate(config)
    numbers = {**result.metrics, "grad_norm": result.grad_norm, "learning_rate": rate, "update_norm": update}
    return numbers, gradient
