"""Completions of prompts, with the log-probability of every sampled token."""

from collections.abc import Callable, Sequence

from peft import PeftModel
from transformers import PreTrainedModel

from lowlevel.model.placement import Placement
from lowlevel.sampling.completion import Completion, Sampler, Sampling, completion_keys
from lowlevel.sampling.plain import PlainSampler

__all__ = ["Completion", "PlainSampler", "Sampler", "Sampling", "build_sampler", "completion_keys"]


def build_sampler(
    model: PreTrainedModel | PeftModel, placement: Placement, stop_ids: Sequence[int], note: Callable[[str], None]
) -> Sampler:
    """The fastest sampler that takes the model; `note` prints a line if that is not the usual one, and why."""
    return PlainSampler(model, placement, stop_ids)
