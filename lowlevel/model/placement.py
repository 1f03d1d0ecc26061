"""Device and precision of a model."""

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
    """Device and precision of a model."""

    device: torch.device
    precision: str  # fp16, bf16 or fp32

    @property
    def dtype(self) -> torch.dtype:
        """dtype of activations and matrix products."""
        return DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """The autocast region of a forward pass; disabled in fp32.

        Its cache is off: each adapter weight is used once per pass, so it would only hold copies until the pass ends.
        """
        enabled = self.precision != "fp32"
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)


def choose_placement(precision: str) -> Placement:
    """Choose the device, and check that it supports the precision.

    Call it before the process's first product on the GPU: from compute capability 9.0 on, where torch's default cuBLAS
    workspaces are large, it sets small ones in the environment. On older GPUs the variable only costs time. Raises
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
