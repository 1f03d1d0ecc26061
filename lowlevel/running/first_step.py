"""The first step of DPO with a fresh adapter: B = 0, so the policy is its reference, and every margin is 0.

Both pass the same batch through the same layers and kernels, so their bits are equal. A base that is not the same
function twice, or a reference that is not the policy's own, would train silently on margins of its own.
"""

from __future__ import annotations

from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError
from lowlevel.optim.train_state import StepResult

MARGINS = "rewards/margins"
SIDES = ("chosen", "rejected")
# Of the mean log-probability of a completion: what rounding can bring, some 100 roundings of fp32, 2 of fp16 and bf16.
BOUNDS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}


def starts_as_reference(config: RunConfig) -> bool:
    """Whether a new run's policy begins as its reference: no dropout in it, and no adapter that it goes on from."""
    without_dropout = config.dpo.disable_dropout or config.lora.lora_dropout == 0
    return config.method == "dpo" and without_dropout and config.lora.init_from is None


def all_ties(result: StepResult) -> bool:
    """Whether every margin is exactly 0, or there is none; a tie counts one half."""
    return result.metrics.get(MARGINS, 0.0) == 0.0 and result.metrics.get("rewards/accuracies", 0.5) == 0.5


def check_first_step(result: StepResult, config: RunConfig, precision: str) -> str | None:
    """A line to warn with where policy and reference differ by rounding; None where they are equal.

    Args:
        result: of step 1 of a run that `starts_as_reference`.
        config: the run's.
        precision: fp32, fp16 or bf16; chooses the bound.

    Raises:
        ConfigError: they differ by more.
    """
    if all_ties(result):
        return None
    found = result.metrics
    logps = [(found[f"logps/{side}"], found[f"logps/ref_{side}"]) for side in SIDES]
    apart = max(abs(found[MARGINS]) / config.dpo.beta, *(abs(own - reference) for own, reference in logps))
    bound = BOUNDS[precision] * max(abs(reference) for _, reference in logps)
    what = (
        f"step 1: a fresh adapter's margins are not 0: mean {found[MARGINS]:.3g}; mean log-probabilities of policy and "
        f"reference are {apart:.3g} apart"
    )
    if apart <= bound:
        return f"warning: {what}, within rounding ({bound:.3g})"
    cache = "leave out dpo.reference_cache, or " if config.dpo.reference_cache else ""
    raise ConfigError(
        f"{what} (bound {bound:.3g}): the reference is not the policy at its start; nothing was saved; {cache}run "
        "lowlevel verify on the run file"
    )
