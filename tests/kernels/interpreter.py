"""Whether this process runs Triton kernels on CPU tensors, in Triton's interpreter.

That needs TRITON_INTERPRET=1 before Triton is imported: `test_kernels_in_the_interpreter` starts the tests named
`interpreted` in a process of their own. The same checks on a GPU: tests/gpu.
"""

import os

import pytest
import torch
from torch import Tensor

HALF, SINGLE = torch.float16, torch.float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MODE = "interpreted" if INTERPRETED else "twins"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_kernels_in_the_interpreter")


def logits_and_targets(c: int, v: int, dtype: torch.dtype = SINGLE) -> tuple[Tensor, Tensor]:
    """Logits with a standard deviation of 5; targets at both ends of the vocabulary and in between."""
    generator = torch.Generator().manual_seed(c * 7919 + v)
    targets = torch.randint(0, v, (c,), generator=generator)
    targets[0] = v - 1
    if c > 1:
        targets[1] = 0
    return (torch.randn(c, v, generator=generator) * 5).to(dtype), targets
