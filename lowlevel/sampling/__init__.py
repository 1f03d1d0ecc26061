"""Completions of prompts, with the log-probability of every sampled token.

    completion.py     what every sampler takes and returns
    draw.py           the next token: Gumbel noise from a hash, so a completion is the same in every batch
    plain.py          by Hugging Face's generate: for every architecture, and the truth for tests
    fast.py           continuous batching: which completion is in which slot of the cache
    steps.py          passes on the device, without the host: eager, compiled, or captured in CUDA graphs
    cached_model.py   the base's own layers over the cache
    joined.py         their linear layers: one product for those that read the same tensor

The fast sampler: a prompt but for its last token is read once, in packed rows, and copied to the slots of its other
samples. A long beginning of several prompts, such as few-shot examples, is read once and copied to all slots
(batch/beginnings.py). From then on a slot is its last token and its position: a step feeds that token to the layers,
draws the next one, and writes it with its log-probability. A prompt's last token is the first to be fed, as at the head
of each completion in a training row (batch/layout.py). The host looks at the finished flags, and lets a watch end
completions, after each 8 steps (on a CPU after each); it refills slots while completions wait, and then takes fewer
rows: with captured graphs half of them whenever half are done, else as many as are left.

A captured step is one for each number of rows (powers of two) and serves every length, because attention reads the
positions on the device (kernels/decoding.py). Weights and adapters are read in place: after an optimizer step nothing
is captured anew. The products are the trainer's, in its dtype, so that log-probabilities agree with its own up to
rounding: 1e-6 in fp32, about 1e-2 at most in fp16 with logits of size 10.
"""

from collections.abc import Callable, Sequence

from lowlevel.model.placement import Placement
from lowlevel.model.policy import AnyModel, plain_model
from lowlevel.sampling.cached_model import misfit
from lowlevel.sampling.completion import Completion, Sampler, Sampling, completion_keys
from lowlevel.sampling.fast import FastSampler
from lowlevel.sampling.plain import PLAIN, PlainSampler

__all__ = ["Completion", "FastSampler", "PlainSampler", "Sampler", "Sampling", "build_sampler", "completion_keys"]


def build_sampler(
    model: AnyModel, placement: Placement, stop_ids: Sequence[int], note: Callable[[str], None]
) -> Sampler:
    """The fastest sampler that takes the model; `note` prints a line if that is not the usual one, and why."""
    why = misfit(plain_model(model), placement)
    if why is None:
        return FastSampler(model, placement, stop_ids, note)
    note(f"sampling by {PLAIN}: {why}")
    return PlainSampler(model, placement, stop_ids)
