"""Weights of rows and replies: which tokens they reach, that 1 changes nothing, and what is refused."""

import numpy as np
import pytest

from lowlevel.errors import ConfigError, DataError


def chat(*replies):
    """A conversation with these replies, each with its weight or None for no key."""
    rows = []
    for text, weight in replies:
        own = {} if weight is None else {"weight": weight}
        rows += [{"role": "user", "content": "q"}, {"role": "assistant", "content": text, **own}]
    return {"messages": rows}


def weights_of(example, chatml):
    """The reply's text and weight of each run of learned tokens."""
    given = np.ones(len(example.labels), np.float32) if example.weights is None else example.weights
    learned = np.flatnonzero(example.labels != -100)
    runs = np.split(learned, np.flatnonzero(np.diff(learned) > 1) + 1)
    assert all(len({*given[part].tolist()}) == 1 for part in runs)
    return [(chatml.decode(example.labels[part].tolist()), float(given[part[0]])) for part in runs]


def test_a_weight_reaches_its_reply_with_the_end_of_turn(run, write, chatml):
    row = chat(("one", None), ("two", 0.25), ("three", 0), ("four", 3))
    plain = chat(("one", None), ("two", None), ("three", 0), ("four", None))
    data = run(write({**row, "w": 0.5}, {**row, "w": 1}, {**plain, "w": 1}, {**plain, "w": 2}), weight_column="w")
    replies = ("one<|im_end|>", "two<|im_end|>", "four<|im_end|>")
    expected = [[0.5, 0.125, 1.5], [1, 0.25, 3], [1, 1, 1], [2, 2, 2]]
    assert [weights_of(x, chatml) for x in data.train] == [list(zip(replies, w, strict=True)) for w in expected]
    assert [x.weights is None for x in data.train] == [False, False, True, False]
    assert data.train[0].weights.dtype == np.float32
    assert data.report.train.warnings["replies with a weight of their own in the loss"] == 4


def test_truncation_and_supervise_all(run, write, chatml):
    row = {**chat(("one", None), ("two", 0.25)), "w": 2}
    (whole,) = run(write(row), weight_column="w").train
    (cut,) = run(write(row), weight_column="w", max_length=len(whole.labels) - 3).train
    assert np.array_equal(cut.weights, whole.weights[:-3])
    (every,) = run(write(row), weight_column="w", supervise="all").train
    two = whole.weights == 0.5
    assert np.array_equal(every.weights, np.where(two, 0.5, 2)) and chatml.decode(every.labels[two]) == "two<|im_end|>"


def test_weights_of_one_change_no_token_and_no_fingerprint(run, write):
    row = chat(("one", None), ("two", None))
    plain = run(write(row)).report.train.fingerprint
    ones = run(write({**chat(("one", 1), ("two", 1.0)), "w": 1.0}), weight_column="w")
    assert ones.report.train.fingerprint == plain and ones.train[0].weights is None
    others = [run(write({**row, "w": 0.5}), weight_column="w"), run(write(chat(("one", 0.5), ("two", None))))]
    assert len({plain, *(data.report.train.fingerprint for data in others)}) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, r'"w" is 0: the row is not to be learned; keep the others with \[\[data.filters\]\] w > 0'),
        (-0.5, '"w" is -0.5, expected a weight from 1e-6 to 1e6'),
        (1e7, "expected a weight from"),
        ("1", "is text, expected a number"),
        (None, "is null, expected a number"),
    ],
)
def test_a_weight_of_a_row_that_is_refused(run, write, value, message):
    with pytest.raises(DataError, match=message):
        run(write({**chat(("one", None)), "w": value}, {**chat(("two", None)), "w": 1}), weight_column="w")


def test_an_absent_column_and_one_that_is_not_read(run, write):
    with pytest.raises(ConfigError, match='data.weight_column: .*has no column "w"; found: messages'):
        run(write(chat(("one", None))), weight_column="w")
    report = run(write({**chat(("one", None)), "weight": 0.5})).report.train
    assert report.warnings == {'column "weight" ignored (data.weight_column = "weight" reads it)': 1}
