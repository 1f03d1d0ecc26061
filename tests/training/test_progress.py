"""The line that a run prints for a logged step."""

import pytest

from lowlevel.running.progress import describe

RECORD = {"step": 3, "loss": 1.25, "grad_norm": 0.5, "learning_rate": 2e-4, "tokens_per_second": 12345.6}
LINE = "loss 1.2500  grad_norm 0.500  lr 2.00e-04  12,346 tokens/s"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"peak_allocated_gib": 0.0, "skipped_steps": 0}, LINE),  # on a CPU, without an overflow
        ({"peak_allocated_gib": 1.5, "skipped_steps": 2}, f"{LINE}  1.50 GiB  2 skipped"),
    ],
)
def test_memory_and_skipped_steps_are_shown_if_there_are_any(more, expected):
    assert describe({**RECORD, **more}) == expected
