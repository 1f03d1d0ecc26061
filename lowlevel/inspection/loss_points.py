"""One preference pair and what each loss makes of it: value and derivatives in float64, by autograd.

Each number comes out of `lowlevel.losses.dpo_loss`, the function that training uses.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from lowlevel.errors import ConfigError
from lowlevel.losses import LOSSES, dpo_loss
from lowlevel.losses.preference import PairLogps

LOGPS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
SYMBOLS = {  # of the hyper-parameters in the formulas
    "beta": "beta",
    "label_smoothing": "eps",
    "discopop_tau": "tau",
    "dpop_lambda": "lambda",
    "rpo_alpha": "alpha",
}
EXO_SMOOTHING = 0.001  # exo_pair takes log(label_smoothing), so that 0, everybody's default, is none for it


@dataclass(frozen=True)
class Point:
    """One preference pair: log-probabilities in nats, summed over a completion's tokens, and tokens in each."""

    chosen: float = -10.0
    rejected: float = -12.0
    ref_chosen: float = -11.0
    ref_rejected: float = -11.5
    chosen_length: int = 4
    rejected_length: int = 5


@dataclass(frozen=True)
class LossAtPoint:
    """What `dpo_loss` gives for one pair, with the derivatives of the loss; all floats.

    margin: beta (a - b), the point that the value is at. slope: d loss / d margin along the path of the plot.
    """

    name: str
    parameters: dict[str, float]
    margin: float
    loss: float
    gradients: dict[str, float]
    slope: float

    @property
    def own_parameters(self) -> str:
        """The hyper-parameter that not every loss has, by its symbol, as "eps 0.1"; empty for beta alone."""
        return ", ".join(f"{SYMBOLS[key]} {value:g}" for key, value in self.parameters.items() if key != "beta")


def applicable(loss: str, settings: Mapping[str, float]) -> dict[str, float]:
    """The settings that a loss reads; label_smoothing 0 counts as not given, as it does for dpo_loss."""
    given = {key: value for key, value in settings.items() if key != "label_smoothing" or value != 0}
    return {key: value for key, value in given.items() if key in LOSSES[loss].parameters}


def evaluate(loss: str, point: Point, settings: Mapping[str, float]) -> LossAtPoint:
    """`dpo_loss` in float64 at a point, and its derivatives in the four log-probabilities.

    Raises:
        ConfigError: what dpo_loss refuses, or a result that float64 cannot hold.
    """
    logps = [torch.tensor([vars(point)[key]], dtype=torch.float64, requires_grad=True) for key in LOGPS]
    chosen, rejected, ref_chosen, ref_rejected = logps
    parameters = {**default_parameters(loss), **settings}
    try:
        output = dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            loss_type=loss,
            chosen_lengths=torch.tensor([point.chosen_length]),
            rejected_lengths=torch.tensor([point.rejected_length]),
            **parameters,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    derivatives = torch.autograd.grad(output.losses.sum(), logps)
    gradients = {key: derivative.item() for key, derivative in zip(LOGPS, derivatives, strict=True)}
    slope = (gradients["chosen"] - gradients["rejected"]) / (2 * parameters["beta"])
    row = LossAtPoint(loss, parameters, output.margins.item(), output.losses.item(), gradients, slope)
    if not all(map(math.isfinite, (row.margin, row.loss, row.slope, *gradients.values()))):
        raise ConfigError(f"{loss} is beyond what float64 holds at {asdict(point)}, {parameters}")
    return row


def default_parameters(loss: str) -> dict[str, float]:
    """Every hyper-parameter that a loss reads with its default, from the signatures of the loss and of dpo_loss."""
    if loss not in LOSSES:
        return {}  # dpo_loss says what is wrong
    own, common = (inspect.signature(function).parameters for function in (LOSSES[loss].function, dpo_loss))
    empty = inspect.Parameter.empty
    found = {key: (common if own[key].default is empty else own)[key].default for key in LOSSES[loss].parameters}
    return {**found, "label_smoothing": EXO_SMOOTHING} if loss == "exo_pair" else found


def path_of(point: Point, beta: float) -> dict[str, float]:
    """From four log-probabilities to the weight sigma(-margin) that DPO's gradient gives the pair."""
    logps = [torch.tensor([vars(point)[key]], dtype=torch.float64) for key in LOGPS]
    pairs = PairLogps(*logps)
    output = dpo_loss(logps[0], logps[1], logps[2], logps[3], beta=beta)
    steps = {
        "chosen_logratio": pairs.chosen_logratios,
        "rejected_logratio": pairs.rejected_logratios,
        "chosen_reward": output.chosen_rewards,
        "rejected_reward": output.rejected_rewards,
        "margin": output.margins,
        "sigmoid_of_minus_margin": torch.sigmoid(-output.margins),
    }
    return {name: value.item() + 0.0 for name, value in steps.items()}
