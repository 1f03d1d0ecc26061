"""Dropout by counter: the mask is a hash of (seed, step, data row, branch, position, module, feature).

There is no generator state: a recomputed, replayed or resumed step draws the same mask. The key names a token, not its
place in the batch, so packing, batch size and accumulation do not change the mask either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowlevel.hashing import MULTIPLIER_1, MULTIPLIER_2, feature_keys, mix32


class DropoutState:
    """Keys of the current micro-batch, shared by all dropout modules of a model; None: dropout is off."""

    def __init__(self) -> None:
        self.token_keys: Tensor | None = None  # (rows, T) int32

    def set_micro_batch(self, dropout_keys: Tensor, key: int | Tensor) -> None:
        """Set the keys of the next passes: the batch's (rows, T) keys and the step's `key32(seed, step)`."""
        self.token_keys = mix32(dropout_keys ^ key)

    def disable(self) -> None:
        """Switch dropout off for the next passes."""
        self.token_keys = None


class CounterDropout(nn.Module):
    """Replaces an adapter's `lora_dropout`: zero with probability p, otherwise scale by 1 / (1 - p)."""

    def __init__(self, p: float, salt: int, features: int, state: DropoutState, device: torch.device) -> None:
        """`salt` differs for each module of a model."""
        super().__init__()
        self.p = p
        self.state = state
        self.feature_keys: Tensor
        self.register_buffer("feature_keys", feature_keys(salt, features, device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, T, features) in any floating dtype."""
        if self.state.token_keys is None:
            return x
        if torch.compiler.is_compiling():
            # torch 2.11 silently compiles _Dropout's gradient to zero. The compiled formula stores no mask either.
            return drop(x, self.state.token_keys, self.feature_keys, self.p)
        return _Dropout.apply(x, self.state.token_keys, self.feature_keys, self.p)


class _Dropout(torch.autograd.Function):
    """Saves only the keys; the backward pass recomputes the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_keys: Tensor, keys: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(token_keys, keys)
        ctx.p = p
        return drop(x, token_keys, keys, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        token_keys, keys = ctx.saved_tensors
        return drop(grad, token_keys, keys, ctx.p), None, None, None


def drop(x: Tensor, token_keys: Tensor, keys: Tensor, p: float) -> Tensor:
    """x (rows, T, features) times 0 where dropped and 1 / (1 - p) where kept.

    Token keys (rows, T) and feature keys (features,) are hashes already, so two multiplications are enough to mix each
    pair (the tests bound rate and correlations). A random int32 is below -2**31 + p * 2**32 with probability p.
    """
    bits = token_keys.unsqueeze(-1) ^ keys
    bits.mul_(MULTIPLIER_1)
    bits.bitwise_xor_(bits >> 16)
    bits.mul_(MULTIPLIER_2 - 2**32)
    keep = bits >= int(p * 2**32) - 2**31
    return x.mul(keep).mul_(1 / (1 - p))
