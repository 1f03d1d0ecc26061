"""A preference loss at one pair, for `lowlevel losses`: its value and its derivatives, in float64 by autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowlevel.errors import ConfigError

# One pair: log-probabilities in nats, summed over a completion's tokens, and the tokens in each.
LOGPS = {"chosen": -10.0, "rejected": -12.0, "ref_chosen": -11.0, "ref_rejected": -11.5}
LENGTHS = {"chosen_length": 4, "rejected_length": 5}
EXO_SMOOTHING = 0.001  # exo_pair takes log(label_smoothing), so the usual default 0 is invalid


@dataclass(frozen=True)
class LossAtPoint:
    """A loss and its derivatives at one pair, in float64.

    margin: beta (a - b), of simpo and orpo beta (a/n+ - b/n-). slope: d loss / d margin while the chosen reward rises
        and the rejected one falls by as much.
    """

    name: str
    formula: str
    paper: str
    parameters: dict[str, float]
    margin: float
    loss: float
    gradients: dict[str, float]
    slope: float


def read_point(given: Mapping[str, float]) -> dict[str, float]:
    """The pair that the flags describe.

    Raises ConfigError: a log-probability above 0, or a length that is not a whole number from 1.
    """
    for key, value in given.items():
        if key in LOGPS and value > 0:
            raise ConfigError(f"{flag(key)} is a log-probability and cannot be above 0, got {value:g}")
        if key in LENGTHS and not (value.is_integer() and 1 <= value < 2**31):
            raise ConfigError(f"{flag(key)} is a number of tokens: expected a whole number >= 1, got {value:g}")
    lengths = {key: int(given.get(key, default)) for key, default in LENGTHS.items()}
    logps = {key: given.get(key, default) for key, default in LOGPS.items()}
    squares = given.get("log_square_sum", -0.3)
    if squares > 0:
        raise ConfigError(f"--log-square-sum is the logarithm of at most 1 and cannot be above 0, got {squares:g}")
    return {**logps, **lengths, "margin": given.get("margin", 1.0), "log_square_sum": squares}


def used_by(loss: str, settings: Mapping[str, float]) -> dict[str, float]:
    """The settings that a loss reads; label_smoothing 0 counts as not given, as in training."""
    from lowlevel.losses import loss_spec

    given = {key: value for key, value in settings.items() if key != "label_smoothing" or value != 0}
    return {key: value for key, value in given.items() if key in loss_spec(loss).parameters}


def evaluate(name: str, point: Mapping[str, float], settings: Mapping[str, float]) -> LossAtPoint:
    """The loss at a point as training computes it, and its derivatives by autograd.

    Raises ConfigError: an unknown loss, a wrong hyper-parameter, or a result that float64 cannot hold.
    """
    import torch

    from lowlevel.losses import PairLogps, PreferenceLoss
    from lowlevel.losses.dpo_table import reward_counts
    from lowlevel.losses.registry import check_result

    logps = [torch.tensor([point[key]], dtype=torch.float64, requires_grad=True) for key in LOGPS]
    lengths = torch.tensor([point[key] for key in LENGTHS])
    tokens = [(torch.cat(sums) / lengths).repeat_interleave(lengths) for sums in (logps[:2], logps[2:])]
    values = {"margin": torch.tensor([point["margin"]], dtype=torch.float64)}
    chosen_length, rejected_length = lengths.split(1)
    ids = torch.arange(2).repeat_interleave(lengths)
    statistics = {"log_square_sum": torch.full_like(tokens[0], point["log_square_sum"])}
    pairs = PairLogps(logps[0], logps[1], logps[2], logps[3], chosen_length, rejected_length, tokens[0], tokens[1],
                      ids, values=values, statistics=statistics)  # fmt: skip
    try:
        parameters = {**_defaults(name), **settings}
        loss = PreferenceLoss.of(name, **parameters)
        if loss.spec.reference_free:
            zero = torch.zeros(1, dtype=torch.float64)
            pairs = replace(pairs, ref_chosen_logps=zero, ref_rejected_logps=zero)
        if loss.spec.own:
            check_result(loss.spec, pairs, loss.settings, logps[0], size=1)
        output = loss(pairs)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = torch.autograd.grad(output.losses.sum(), logps, allow_unused=True)
    gradients = {key: 0.0 if one is None else one.item() for key, one in zip(LOGPS, found, strict=True)}
    counts = (count.item() for count in reward_counts(loss.spec, pairs))
    slope = (gradients["chosen"] * next(counts) - gradients["rejected"] * next(counts)) / (2 * loss.beta)
    margin, value = output.margins.item(), output.losses.item()
    if not all(map(math.isfinite, (margin, value, slope, *gradients.values()))):
        raise ConfigError(f"{name} is beyond what float64 holds at {dict(point)}, {parameters}")
    return LossAtPoint(name, loss.spec.formula, loss.spec.paper, parameters, margin, value, gradients, slope)


def _defaults(name: str) -> dict[str, float]:
    """The hyper-parameters that a loss reads, with their defaults. Raises ValueError for an unknown loss."""
    from inspect import signature

    from lowlevel.losses import loss_spec
    from lowlevel.losses.dpo_table import BETA, BETAS, HYPERPARAMETERS

    spec = loss_spec(name)
    found = {key: one.default for key, one in HYPERPARAMETERS.items()}
    found |= {"beta": BETAS.get(name, BETA), "label_smoothing": EXO_SMOOTHING if name == "exo_pair" else 0.0}
    if spec.own:
        own = signature(spec.function).parameters
        found |= {key: one.default for key, one in own.items() if one.default is not one.empty}
    return {key: found[key] for key in spec.parameters if key in found}


def path_of(point: Mapping[str, float], beta: float) -> dict[str, float]:
    """From four log-probabilities to sigma(-margin), the weight of the pair in DPO's gradient."""
    import torch

    a, b = point["chosen"] - point["ref_chosen"], point["rejected"] - point["ref_rejected"]
    margin = beta * a - beta * b
    return {
        "chosen_logratio": a,
        "rejected_logratio": b,
        "chosen_reward": beta * a,
        "rejected_reward": beta * b,
        "margin": margin,
        "sigmoid_of_minus_margin": torch.sigmoid(torch.tensor(-margin, dtype=torch.float64)).item(),
    }


def flag(key: str) -> str:
    """The option that gives a number."""
    return f"--{key.replace('_', '-')}"
