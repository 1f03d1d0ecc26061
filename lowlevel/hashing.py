"""32- and 64-bit integer hashes: the only source of randomness in a training step (data order, dropout).

A hash has no state, so a recomputed, replayed or resumed step gets the same numbers. And a checksum of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# lowbias32 (C. Wellons, "Prospecting for Hash Functions", 2018)
MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
_CHUNK = 2**22  # entries of a tensor that a checksum takes at once


def mix32(values: Tensor) -> Tensor:
    """Hash each int32 element in place (lowbias32).

    int32 products wrap like unsigned ones; right shifts are masked because they copy the sign bit.
    """
    values.bitwise_xor_((values >> 16) & 0xFFFF)
    values.mul_(MULTIPLIER_1)
    values.bitwise_xor_((values >> 15) & 0x1FFFF)
    values.mul_(MULTIPLIER_2 - 2**32)
    values.bitwise_xor_((values >> 16) & 0xFFFF)
    return values


def mix32_array(values: np.ndarray) -> np.ndarray:
    """The same hash for a uint32 array; returns a new uint32 array."""
    mixed = values.astype(np.uint32)
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(MULTIPLIER_1)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(MULTIPLIER_2)
    return mixed ^ (mixed >> np.uint32(16))


def key32(*parts: int) -> int:
    """One int32 from several integers, each reduced modulo 2**32, chained through the hash."""
    key = np.zeros(1, np.uint32)
    for part in parts:
        key = mix32_array(key ^ np.uint32(part % 2**32)) + np.uint32(0x9E3779B9)
    return int(mix32_array(key).astype(np.int32)[0])


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash a uint64 array (SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def feature_keys(salt: int, size: int, device: torch.device | str) -> Tensor:
    """Keys of `size` features for one module, (size,) int32."""
    keys = torch.arange(size, dtype=torch.int32, device=device)
    return mix32(keys.bitwise_xor_(key32(salt)))


def checksum(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Fletcher's two sums, as int64, over the 32-bit words (or bytes) of tensors; the same on every device."""
    first = second = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        words = flat.view(torch.int32) if flat.element_size() == 4 else flat.view(torch.uint8)
        for chunk in words.split(_CHUNK):
            values = chunk.long()
            places = torch.arange(1, len(values) + 1, device=values.device)
            own, weighted = torch.stack([values.sum(), (values * places).sum()]).tolist()
            first, second = first + own, second * 31 + weighted
    return _as_int64(first), _as_int64(second)


def _as_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
