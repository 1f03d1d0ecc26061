"""Shapes and padding of a whole run, counted."""

from types import SimpleNamespace

import numpy as np

from benchmarks.cases import Case
from benchmarks.shapes import batches_of, count
from benchmarks.workload import case_config
from lowlevel.batch.layout import build_batch
from lowlevel.batch.segments import sft_segment
from lowlevel.running.assembly import prepare_data


def batch(*lengths):
    segments = [sft_segment(i, i, np.arange(n + 1), np.arange(n + 1)) for i, n in enumerate(lengths)]
    return build_batch([segments], pairs=False)


def test_shapes_by_hand():
    """Rows are rounded up to multiples of 8: 5 and 7 positions are one shape, 9 are another."""
    same = batch(7)
    assert count([[same], [same, same]]) == {
        "steps": 2,
        "shapes": 1,
        "steps_with_a_new_shape": 1,
        "padding_share": 0.125,  # 3 of 24 positions
    }
    counted = count([[batch(8)], [batch(8), batch(16)], [batch(16)]])
    assert (counted["shapes"], counted["steps_with_a_new_shape"], counted["padding_share"]) == (2, 2, 0.0)


def test_a_run_of_the_workload(out):
    config = case_config(Case("x", "lowlevel", "dpo"), out / "workload", out / "unused", 24)
    rows = list(prepare_data(config)[1].train)
    counted = SimpleNamespace(**count(batches_of(config, rows, 24)))
    assert counted.steps == 24 and 1 < counted.shapes < 32
    assert counted.steps_with_a_new_shape <= counted.shapes and 0 < counted.padding_share < 0.2
