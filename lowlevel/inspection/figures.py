"""Numbers as text: with a fixed number of digits, with a sign, or as a percentage; NaN is an en dash."""

from __future__ import annotations

import math

NONE = "–"


def plain(value: float, digits: int = 4, sign: str = "-") -> str:
    """A number; `sign="+"` also marks positive values. A value that rounds to zero has no sign."""
    if math.isnan(value):
        return NONE
    text = f"{value:{sign}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def signed(value: float, digits: int = 4) -> str:
    """A summand, with its sign."""
    return plain(value, digits, "+")


def percent(share: float) -> str:
    """A share in [0, 1]."""
    if not math.isfinite(share):
        return NONE
    if 0 < share < 1e-4:
        return "<0.01%"
    return f"{100 * share:.{2 if share < 1e-2 else 1}f}%"


def typographic(text: str) -> str:
    """With minus signs instead of hyphens, for a page."""
    return text.replace("-", "\u2212")
