"""The same step from the same weights under other settings: its losses, metrics, gradient and update."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.schema import DPOConfig, RunConfig, SFTConfig
from lowlevel.errors import ConfigError
from lowlevel.execution import Eager
from lowlevel.optim.optimizer import load_optimizer_tensors, optimizer_tensors
from lowlevel.replaying.session import Session, take_step
from lowlevel.running.assembly import build_method, check_loss

TRAIN_KEYS = ("learning_rate", "max_grad_norm")
DPO_KEYS = tuple(name for name in DPOConfig.model_fields if name not in ("reference_cache", "loss_kwargs"))
SFT_KEYS = tuple(name for name in SFTConfig.model_fields if name != "loss_kwargs")


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
        keys = DPO_KEYS if method == "dpo" else SFT_KEYS
        _, is_kwarg, kwarg = name.partition("loss_kwargs.")
        if not equals or not (name in (*TRAIN_KEYS, *keys) or is_kwarg):
            if name in DPO_KEYS and equals:
                raise ConfigError(f"--what-if {text}: {name} is a setting of dpo, and this is an {method} run")
            known = ", ".join([*TRAIN_KEYS, *keys, "loss_kwargs.KEY"])
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
    execution = Eager(session.policy, build_method(config, session.inputs.attention))
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
            load_optimizer_tensors(optimizer, weights, state)
        else:
            optimizer.state.clear()
        session.policy.layers.use(compiled=session.compiled)
    rate = session.rate(config)
    numbers = {**result.metrics, "grad_norm": result.grad_norm, "learning_rate": rate, "update_norm": update}
    return numbers, gradient
