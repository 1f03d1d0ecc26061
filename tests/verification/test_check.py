"""A check holds only for a finite number within its bound."""

import math

import pytest

from lowlevel.verification.subject import check


@pytest.mark.parametrize(
    ("measured", "bound", "ok"),
    [(0.0, 0, True), (1e-9, 0, False), (0.5, 0.5, True), (0.6, 0.5, False), (math.nan, 1.0, False),
     (math.inf, math.inf, False)],
)  # fmt: skip
def test_only_a_finite_number_within_the_bound_holds(measured, bound, ok):
    assert check("group", "name", measured, bound).ok is ok
