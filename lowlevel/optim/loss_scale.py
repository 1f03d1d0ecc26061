"""Dynamic loss scaling for fp16 (arXiv 1710.03740, section 3.3), with torch.amp.GradScaler's rule and a plain state.

The scale is a host number: the loop reads one device value a step anyway (was the gradient finite?), and a number that
is logged, saved and compared should not hide in a device tensor.
"""

from __future__ import annotations

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

    def update(self, finite: bool) -> None:
        """After each attempt: halve after an overflow, double after 2,000 attempts without one; count, if disabled."""
        if not finite:
            self.skipped_steps += 1
            self.skips_in_a_row += 1
            self.good_steps = 0
            self.scale *= 0.5 if self.enabled else 1.0
            return
        self.skips_in_a_row = 0
        self.good_steps += 1
        if self.enabled and self.good_steps == GROWTH_INTERVAL:
            self.scale *= 2.0
            self.good_steps = 0
