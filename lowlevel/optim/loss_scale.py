"""Dynamic loss scaling for fp16 (arXiv 1710.03740, section 3.3), with torch.amp.GradScaler's rule and a plain state.

The scale is a number on the host, because the loop reads the gradient norm of each step anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

INITIAL_SCALE = 65536.0
GROWTH_INTERVAL = 2000
MAX_SKIPS_IN_A_ROW = 10


@dataclass
class LossScale:
    """Multiply the loss by `scale` before the backward pass, divide the gradient by it after."""

    scale: float = INITIAL_SCALE
    enabled: bool = True
    good_steps: int = 0
    skipped_steps: int = 0
    skips_in_a_row: int = 0

    @classmethod
    def for_precision(cls, precision: str) -> LossScale:
        """Scaling for fp16; a scale of 1 that never changes otherwise."""
        return cls() if precision == "fp16" else cls(scale=1.0, enabled=False)

    def accepts(self, grad_norm: float) -> bool:
        """Whether to apply the gradient. Halves the scale after an overflow, doubles it after 2,000 steps without."""
        if not math.isfinite(grad_norm):
            self.skipped_steps += 1
            self.skips_in_a_row += 1
            self.good_steps = 0
            self.scale *= 0.5 if self.enabled else 1.0
            return False
        self.skips_in_a_row = 0
        self.good_steps += 1
        if self.enabled and self.good_steps == GROWTH_INTERVAL:
            self.scale *= 2.0
            self.good_steps = 0
        return True

    @property
    def exhausted(self) -> bool:
        """Whether to give up repeating the step at half the scale."""
        return not self.enabled or self.skips_in_a_row > MAX_SKIPS_IN_A_ROW
