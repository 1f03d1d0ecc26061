"""A run that takes long on a CPU says so after its first steps: measured, with what would be faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from bitsandbytes.nn import Linear4bit

from lowlevel.config.schema import RunConfig
from lowlevel.heartbeat import duration
from lowlevel.model.policy import Policy
from lowlevel.optim.train_state import TrainState

MEASURED = 20.0  # seconds of steps before the forecast
LONG = 600.0  # seconds of a run


@dataclass
class Pace:
    """Counts the seconds of this process's steps, from the state at their start."""

    config: RunConfig
    policy: Policy
    total_steps: int
    first: int
    seconds: float  # of the steps before, taken by earlier processes
    decided: bool = False

    def forecast(self, state: TrainState) -> str | None:
        """The line, once, if the steps to come take more than LONG on a CPU."""
        taken, left = state.seconds - self.seconds, self.total_steps - state.step
        if self.decided or taken < MEASURED or self.policy.placement.device.type != "cpu":
            return None
        self.decided = True
        step = taken / (state.step - self.first)
        if step * left < LONG:
            return None
        return (
            f"slow: {step:.1f} s a step on this CPU, about {duration(step * left)} left; "
            f"faster: {', '.join(faster(self.config, self.policy))}, or a GPU"
        )


def faster(config: RunConfig, policy: Policy) -> list[str]:
    """Settings that shorten a step on a CPU, the most effective first."""
    layers = [layer.base_layer for layer in policy.lora_layers]
    packed = [cast(Linear4bit, layer) for layer in layers if isinstance(layer, Linear4bit)]
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    gib = weights * policy.placement.dtype.itemsize / 2**30
    unpack = f"train.dequantize_once = true or model.load_in_4bit = false (both need {gib:.1f} GiB for the weights)"
    recompute = "train.gradient_checkpointing = false (more memory)"
    return [
        *([unpack] if packed else []),
        *([recompute] if config.train.gradient_checkpointing else []),
        f"a smaller data.max_length (now {config.data.max_length:,})",
        "fewer steps (train.max_steps)",
    ]
