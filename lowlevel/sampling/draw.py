"""Drawing tokens without a random generator: the Gumbel-max trick with noise that is a hash.

    token = argmax_v ( z_v / T + g_v )      g_v = -log(-log u_v)      u_v = hash(key of the completion, position, v)

This draws from softmax(z / T). The noise depends on nothing else, so a completion is the same in every batch. It is
computed from w = 1 - u, -log u = -log1p(-w): fp32 numbers are dense near w = 0, where the largest g come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowlevel.hashing import feature_keys, mix32

SALT = 0x53414D50  # of the tokens' keys


def token_keys(vocabulary: int, device: torch.device) -> Tensor:
    """A key of each token, (V,) int32."""
    return feature_keys(SALT, vocabulary, device)


def gumbel(keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise (B, V) fp32: keys (B,) int32 and positions (B,) int32 of completions, `token_keys` (V,)."""
    rows = mix32(mix32(keys.clone()) + positions)
    bits = mix32(rows[:, None] ^ tokens)
    w = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-w))


def draw(
    logits: Tensor, temperature: float | Tensor, keys: Tensor, positions: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The next token (B,) int64 of each row, and its log-probability (B,) fp32 at the temperature.

    Args:
        logits: (B, V) floating.
        temperature: a number or a () tensor; 0: the likeliest token, and log-probabilities at temperature 1.
        keys, positions, tokens: as in `gumbel`.
    """
    if isinstance(temperature, float) and temperature == 0:  # the same numbers, and no noise of the vocabulary's size
        scaled = logits.float()
        chosen = scaled.argmax(-1)
    else:
        heat = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
        scaled = logits.float() / torch.where(heat > 0, heat, 1.0)
        noise = gumbel(keys, positions, tokens)
        chosen = torch.where(heat > 0, scaled + noise, scaled).argmax(-1)
    return chosen, scaled.gather(1, chosen[:, None])[:, 0] - scaled.logsumexp(-1)
