"""Logged and saved numbers against those of a replay: the first difference, and its size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Times and memory are not compared.
UNCOMPARED = ("tokens_per_second", "peak_allocated_gib", "peak_reserved_gib")
# If bits may differ (another device or precision, a GPU outside deterministic mode):
NUMBERS = 1e-2  # relative to the logged number, or absolute below 1
TENSORS = 5e-2  # norm of the difference, relative to the norm of the tensor


@dataclass(frozen=True)
class Row:
    """One quantity of one step."""

    step: int
    quantity: str
    logged: str
    replayed: str
    difference: float  # largest absolute one; 0 if identical, infinite if one side is missing
    identical: bool
    good: bool  # identical, or within a tolerance


def number_rows(step: int, logged: Mapping[str, Any], replayed: Mapping[str, Any], *, exact: bool) -> list[Row]:
    """A logged record against the replay's, in the order of the replay's keys."""
    names = [*replayed, *(name for name in logged if name not in replayed)]
    return [
        _number(step, name, logged.get(name), replayed.get(name), exact)
        for name in names
        if name not in UNCOMPARED and name != "step"
    ]


def _number(step: int, name: str, logged: float | None, replayed: float | None, exact: bool) -> Row:
    if logged is None or replayed is None:
        left, right = ("-" if value is None else f"{value:.9g}" for value in (logged, replayed))
        return Row(step, name, left, right, math.inf, False, False)
    same = logged == replayed or (math.isnan(logged) and math.isnan(replayed))
    difference = 0.0 if same else abs(logged - replayed)
    good = same or (not exact and difference <= NUMBERS * max(1.0, abs(logged)))
    digits = ".9g" if same or f"{logged:.9g}" != f"{replayed:.9g}" else ".17g"
    return Row(step, name, format(logged, digits), format(replayed, digits), difference, same, good)


def tensors_row(
    step: int, what: str, saved: Mapping[str, Tensor], replayed: Mapping[str, Tensor], *, exact: bool
) -> Row:
    """Saved tensors against the replay's, bit for bit; the row names the first one that differs, in the replay's order.

    Without `exact`, floating tensors may differ by TENSORS, and others (8-bit codes) are not judged.
    """
    count = f"{len(saved)} tensors"
    odd = [name for name in [*replayed, *saved] if name not in saved or name not in replayed]
    if odd:
        return Row(step, f"{what}: {odd[0]}", count, f"{len(replayed)} tensors", math.inf, False, False)
    wrong = [name for name, tensor in replayed.items() if not same_bits(saved[name], tensor)]
    if not wrong:
        return Row(step, what, count, count, 0.0, True, True)
    good = not exact and all(_near(saved[name], replayed[name]) for name in wrong)
    largest = max(largest_difference(saved[name], replayed[name]) for name in wrong)
    shown = f"{len(wrong)} of {len(saved)} differ"
    return Row(step, f"{what}: {wrong[0]}", count, shown, largest, False, good)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bytes: NaN equals itself, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b|; infinite for other shapes or if only one side is NaN."""
    if a.shape != b.shape:
        return math.inf
    difference = (a.detach().cpu().double() - b.detach().cpu().double()).abs()
    return float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max()) if difference.numel() else 0.0


def _near(saved: Tensor, replayed: Tensor) -> bool:
    if saved.shape != replayed.shape:
        return False
    if not saved.dtype.is_floating_point:
        return True
    saved, replayed = saved.double().cpu(), replayed.detach().double().cpu()
    return bool((saved - replayed).norm() <= TENSORS * saved.norm())
