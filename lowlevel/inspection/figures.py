"""Numbers as text: with a fixed number of digits, with a sign, or as a percentage; NaN is an en dash."""

from __future__ import annotations

import math

NONE = "–"


def signed(value: float, digits: int = 4) -> str:
    """A summand: with its sign, except for a value that rounds to zero."""
    if math.isnan(value):
        return NONE
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def plain(value: float, digits: int = 4) -> str:
    """A number with a sign only if it is negative."""
    if math.isnan(value):
        return NONE
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


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
