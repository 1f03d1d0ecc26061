"""What max_length cuts, and the smallest lengths that keep 90, 95 and 99 % of the tokens."""

import numpy as np
import pytest

from lowlevel.config.schema import DataConfig
from lowlevel.data.examples import truncate_pair
from lowlevel.data.truncation import kept_tokens, truncation


def test_the_lengths_of_rows_of_1_to_100_tokens():
    """5,050 tokens; at length L, 100 L - L (L - 1) / 2 stay: 4,545 need 69, 4,797.5 need 79, 4,999.5 need 91."""
    rows = [(n, 0, 0, 0) for n in range(1, 101)]
    found = truncation(rows, DataConfig(max_length=50), limit=80)
    assert (found.rows, found.rows_cut, found.rows_dropped, found.tokens, found.tokens_cut) == (100, 50, 0, 5050, 1275)
    assert found.keeping == {"90": 69, "95": 79, "99": 91}
    line = "max_length 50 cuts 50 of 100 rows (25.2% of tokens); 69 keeps 90 %, 79 keeps 95 %, 91 keeps 99 %"
    assert str(found) == f"{line} (the model takes at most 80)"
    assert str(truncation(rows, DataConfig(max_length=50), limit=91)) == line


def test_a_row_whose_reply_begins_later_is_dropped_and_keeps_nothing():
    rows = [(10, 0, 0, 5), (1000, 0, 0, 999)]
    found = truncation(rows, DataConfig(max_length=512), limit=2048)
    assert (found.rows_cut, found.rows_dropped, found.tokens_cut, found.keeping["90"]) == (1, 1, 1000, 1000)
    assert " rows and drops 1 of these (" in str(found)


@pytest.mark.parametrize("max_prompt", [None, 7])
def test_a_pair_is_cut_by_the_rule_of_the_examples(max_prompt):
    rng = np.random.default_rng(0)
    sizes = np.array([*rng.integers(1, 30, (3, 200)), [-1] * 200])
    for length in (2, 9, 16, 31, 60):
        cut = [truncate_pair([7] * p, [8] * c, [9] * r, length, max_prompt, None) for p, c, r, _ in sizes.T]
        assert kept_tokens(sizes, length, max_prompt).tolist() == [sum(map(len, kept)) for kept in cut]
