"""Completions of prompts, with the log-probability of every sampled token."""

from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lowlevel.model.placement import Placement
from lowlevel.sampling.cached_model import misfit
from lowlevel.sampling.completion import Completion, Sampler, Sampling, completion_keys
from lowlevel.sampling.fast import FastSampler
from lowlevel.sampling.plain import PLAIN, PlainSampler

__all__ = ["Completion", "FastSampler", "PlainSampler", "Sampler", "Sampling", "build_sampler", "completion_keys"]


def build_sampler(
    model: PreTrainedModel | PeftModel, placement: Placement, stop_ids: Sequence[int], note: Callable[[str], None]
) -> Sampler:
    """The fastest sampler that takes the model; `note` prints a line if that is not the usual one, and why."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    why = misfit(base, placement)
    if why is None:
        return FastSampler(model, placement, stop_ids, note)
    note(f"sampling by {PLAIN}: {why}")
    return PlainSampler(model, placement, stop_ids)
