"""Where a model runs and in which precision."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lowlevel import determinism
from lowlevel.errors import ConfigError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16: how files name a dtype."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Placement:
    """Where a model runs and in which precision."""

    device: torch.device
    precision: str  # fp16, bf16 or fp32

    @property
    def dtype(self) -> torch.dtype:
        """dtype of activations and matrix products."""
        return DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """The autocast region of a forward pass (disabled in fp32).

        Without its cache of 16-bit copies: each adapter weight is used once a pass, so the cache would save no cast
        and hold a copy of the whole adapter (100 MB for the recipe) until the pass ends.
        """
        enabled = self.precision != "fp32"
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)


def choose_placement(precision: str) -> Placement:
    """Pick the device, and check that it has the precision asked for.

    From compute capability 9.0 on, where torch's own workspaces for cuBLAS may be large, the environment gets small
    ones, unless it says something else: to be called before the process first multiplies on the GPU. On an H100 that
    saves 96 MiB (benchmarks/results/workspaces_h100.csv). Below it would only cost time: torch 2.11 reads the variable
    in every product, by a regular expression, which is an eighth of what the host needs to launch a compiled
    micro-step.

    Raises:
        ConfigError: bf16 on a GPU below compute capability 8.0; fp16 without a GPU.
    """
    if not torch.cuda.is_available():
        if precision == "fp16":
            raise ConfigError('train.precision = "fp16" needs a GPU, and none is visible: use --train.precision fp32')
        return Placement(torch.device("cpu"), "fp32" if precision == "auto" else precision)
    major, minor = torch.cuda.get_device_capability()
    if major >= 9:
        os.environ.setdefault(determinism.ENVIRONMENT, determinism.SMALL)
    if precision == "bf16" and major < 8:
        raise ConfigError(f'bf16 needs compute capability 8.0; this GPU has {major}.{minor}: use precision = "fp16"')
    return Placement(torch.device("cuda", torch.cuda.current_device()), "fp16" if precision == "auto" else precision)
