"""QLoRA fine-tuning of small language models in plain PyTorch, without a trainer library; every number can be checked.

    sft, dpo, kto, reward, grpo, rloo, ppo, online_dpo    train a run
    steps           take its steps one by one
    Run             open a run folder                 Callback    be called at each step, log line, checkpoint
    loss            register a loss of your own       dpo_loss    the built-in losses as a function of tensors
    PairLogps, TokenLogps, SampledLogps    what a loss receives
    configure       keyword arguments -> RunConfig

`help(lowlevel.sft)` and `help(lowlevel.loss)` say more. Nothing heavy is imported before one of them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowlevel.version import __version__ as __version__

if TYPE_CHECKING:
    from lowlevel.api import configure, dpo, grpo, kto, online_dpo, ppo, reward, rloo, sft, steps, train
    from lowlevel.config.schema import RunConfig
    from lowlevel.errors import LowlevelError
    from lowlevel.losses import PairLogps, SampledLogps, TokenLogps, dpo_loss, loss, masked_cross_entropy, token_logps
    from lowlevel.run import Run
    from lowlevel.running.callbacks import Callback

__all__ = [
    "Callback", "LowlevelError", "PairLogps", "Run", "RunConfig", "SampledLogps", "TokenLogps", "configure", "dpo",
    "dpo_loss", "grpo", "kto", "loss", "masked_cross_entropy", "online_dpo", "ppo", "reward", "rloo", "sft", "steps",
    "token_logps",
    "train",
]  # fmt: skip
_PLACES = {
    "lowlevel.running.callbacks": ("Callback",),
    "lowlevel.errors": ("LowlevelError",),
    "lowlevel.config.schema": ("RunConfig",),
    "lowlevel.losses": ("PairLogps", "TokenLogps", "dpo_loss", "loss", "masked_cross_entropy", "token_logps"),
    "lowlevel.losses.policy_gradient": ("SampledLogps",),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lowlevel' has no attribute {name!r}")
    module = next((module for module, names in _PLACES.items() if name in names), "lowlevel.api")
    if module == "lowlevel.api":
        import_module("lowlevel.running.progress").quiet_libraries()  # before bitsandbytes is imported
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
