"""What every sampler takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lowlevel.errors import ConfigError
from lowlevel.hashing import key32

Ids = Sequence[Sequence[int]]  # whole numbers by prompt
# Gets the number of a completion (prompt * samples + sample) and its next tokens; True ends the completion.
Watch = Callable[[int, Sequence[int]], bool | None]


@dataclass(frozen=True)
class Sampling:
    """Settings of generation; temperature 0 is greedy, and the same seed gives the same completion."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.temperature >= 0:  # NaN is neither
            raise ConfigError(f"{self}: expected at least 1 token and a temperature of at least 0")


@dataclass(frozen=True, eq=False)
class Completion:
    """The tokens that were generated for a prompt.

    Attributes:
        ids: (n,) int64, with the stop token if there is one.
        logps: (n,) fp32, of each token under the whole vocabulary's distribution at the temperature of sampling; of
            greedy tokens at temperature 1.
        ended: the last token is a stop token; False: max_new_tokens cut the completion.
    """

    ids: np.ndarray
    logps: np.ndarray
    ended: bool


class Sampler(Protocol):
    """Samples from a model as it is at the time of the call: its weights and active adapters, without dropout."""

    def sample(
        self, prompts: Ids, sampling: Sampling, *, samples: int = 1, keys: Ids | None = None, watch: Watch | None = None
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, in the order of the prompts.

        Args:
            prompts: token ids, at least one each.
            sampling: there is no top_k and no top_p, so `Completion.logps` are those of the policy.
            samples: completions of each prompt; they share its forward pass.
            keys: an int32 for each completion, [prompt][sample]; the same key draws the same random numbers, whatever
                else is in the batch. None: `completion_keys`.
            watch: called with the tokens of a completion as they are generated, one or several at a time.
        """


def completion_keys(seed: int, prompts: int, samples: int) -> list[list[int]]:
    """A key of each completion, [prompt][sample]: the hash of seed, number of the prompt and number of the sample."""
    return [[key32(seed, prompt, sample) for sample in range(samples)] for prompt in range(prompts)]
