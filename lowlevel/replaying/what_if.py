"""The same step from the same weights under other settings: losses, metrics, gradient and update beside the actual."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.schema import DPOConfig, RunConfig
from lowlevel.errors import ConfigError
from lowlevel.execution import Eager
from lowlevel.methods.dpo import check_loss
from lowlevel.optim.optimizer import load_optimizer_tensors, optimizer_tensors
from lowlevel.replaying.session import Session, take_step
from lowlevel.running.assembly import build_method

TRAIN_KEYS = ("learning_rate", "max_grad_norm")
DPO_KEYS = tuple(name for name in DPOConfig.model_fields if name != "reference_cache")


@dataclass(frozen=True)
class Outcome:
    """What one step does under some settings."""

    settings: str
    numbers: dict[str, float]  # loss, metrics, grad_norm, cosine to the actual gradient, learning_rate, update_norm


def parse_settings(config: RunConfig, text: str) -> RunConfig:
    """The configuration with "beta=0.3" or "loss_type=ipo,beta=0.2" in it.

    Raises:
        ConfigError: not a setting of one step, or a value that a run file could not have either.
    """
    tables = to_tables(config)
    for part in text.split(","):
        key, equals, value = part.partition("=")
        name = key.strip().removeprefix("dpo.").removeprefix("train.")
        section = "train" if name in TRAIN_KEYS else "dpo"
        if not equals or (section == "dpo" and name not in DPO_KEYS):
            known = ", ".join([*TRAIN_KEYS, *(DPO_KEYS if config.method == "dpo" else ())])
            raise ConfigError(f"--what-if {text}: expected NAME=VALUE, NAME one of {known}")
        if section == "dpo" and config.method != "dpo":
            raise ConfigError(f"--what-if {text}: only dpo has such a setting, and this is an {config.method} run")
        tables[section] = {**tables[section], name: _value(value.strip())}
    changed = config_from_tables(tables, f"--what-if {text}")
    if config.method == "dpo":
        try:
            check_loss(changed.dpo)
        except ValueError as error:
            raise ConfigError(f"--what-if {text}: {error}") from None
    return changed


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def what_if(session: Session, settings: Sequence[tuple[str, RunConfig]]) -> list[Outcome]:
    """The coming step as it is, then under each of the settings; weights, state and counters stay as they are.

    Raises:
        NonFiniteError: one of them gives no finite loss or gradient.
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
    """Take the step and undo it. Clipping scales a gradient, which no cosine sees."""
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
