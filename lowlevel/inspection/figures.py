"""Numbers as people read them: signed, with a fixed number of digits, and probabilities as percentages."""

from __future__ import annotations

import math


def signed(value: float, digits: int = 4) -> str:
    """A sum's part: its sign always shown; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def plain(value: float, digits: int = 4) -> str:
    """A number whose sign matters only if it is negative."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def percent(share: float) -> str:
    """A share in [0, 1]."""
    if not math.isfinite(share):
        return "-"
    if 0 < share < 1e-4:
        return "<0.01%"
    return f"{100 * share:.{2 if share < 1e-2 else 1}f}%"


def typographic(text: str) -> str:
    """The same with a minus sign instead of a hyphen, for the page."""
    return text.replace("-", "\u2212")
