"""Geometry of the charts, worked out by hand."""

import math

import pytest

from lowlevel.inspection.charts import histogram, loss_bands, stair


def test_a_stair():
    found = stair([1.0, -1.0])  # from -1 to 1, with 8 % of that span as room on either side: -1.16 to 1.16
    assert found.heights == (6.9, 93.1)
    assert (found.zero, found.heights[-1]) == (50.0, 93.1)
    assert found.line == "M0 50.0H25.0V6.9H75.0V93.1H100"
    assert (found.rises, found.falls) == ("M25.0 50.0V6.9", "M75.0 6.9V93.1")
    assert [(tick.at, tick.label, tick.last) for tick in found.ticks] == [
        (93.1, "−1", True),
        (50.0, "0", False),
        (6.9, "+1", False),
    ]


def test_a_stair_of_nothing_is_flat():
    for sums in ([], [0.0], [0.0, 0.0, 0.0]):
        found = stair(sums)
        assert (found.zero, set(found.heights) | {50.0}, found.rises, found.falls) == (50.0, {50.0}, "", "")
        assert [tick.label for tick in found.ticks] == ["0"]


@pytest.mark.parametrize(
    "values, edges, counts",
    [
        ([0.0], [-1.0, 0.0], [0, 1]),
        ([0.5, 0.52, -0.1], [-0.1, -0.05, 0.0, *(0.05 * i for i in range(1, 11))], [1] + [0] * 11 + [2]),
        ([-3.0, -1.0], [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0], [1, 0, 0, 0, 1, 0, 0]),
        ([20.0, 4.0], [-2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0], None),
    ],
)
def test_a_histogram_has_zero_among_its_edges(values, edges, counts):
    found = histogram(values)
    assert [bin.low for bin in found.bins] == pytest.approx(edges)
    assert sorted(item for bin in found.bins for item in bin.items) == list(range(len(values)))
    assert found.tallest == max(len(bin.items) for bin in found.bins)
    if counts:
        assert [len(bin.items) for bin in found.bins] == counts
    assert "0" in [tick.label for tick in found.ticks]
    for bin, after in zip(found.bins, found.bins[1:], strict=False):
        assert all(bin.low - 1e-9 <= values[item] < after.low + 1e-9 for item in bin.items)


def test_a_label_beside_zero_is_marked():
    """10 bins of 0.1 from -0.1: a narrow page shows "0" and "+0.90" alone."""
    ticks = histogram([-0.05, 0.85, *(0.1 * i for i in range(8))]).ticks
    assert [(tick.label, tick.near) for tick in ticks] == [("−0.10", True), ("0", False), ("+0.90", False)]
    ticks = histogram([-0.01, *(0.02 * i for i in range(14))]).ticks  # 15 bins, one of them below zero
    assert [tick.label for tick in ticks] == ["0", "+0.280"], "no page has room for both"


def test_items_of_a_bin_ascend():
    assert histogram([0.3, 0.1, 0.2, -5.0]).bins[-1].items == (1, 2, 0)


def test_bands_share_tokens_and_loss():
    bands = {band.label: band for band in loss_bands([0.0, 0.005, 3.0, 12.0, -0.0])}
    assert [band.count for band in bands.values()] == [3, 0, 0, 0, 0, 1, 0, 1]
    assert bands["10 and more"].loss == pytest.approx(12 / 15.005)
    assert math.isclose(sum(band.tokens for band in bands.values()), 1)
    assert math.isclose(sum(band.loss for band in bands.values()), 1)
