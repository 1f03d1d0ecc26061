"""The order of rows: a permutation an epoch, and the same one on every machine and in every version."""

from types import SimpleNamespace

import numpy as np
import pytest

from lowlevel.batch.order import DataOrder
from lowlevel.config.schema import RunConfig, TrainConfig
from lowlevel.errors import ConfigError
from lowlevel.hashing import splitmix64

MASK = 2**64 - 1


def plain_splitmix64(value: int) -> int:
    """SplitMix64 in Python's own integers, from Steele, Lea and Flood (OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def epochs(order: DataOrder, count: int) -> list[list[int]]:
    return [order.epoch_order(epoch).tolist() for epoch in range(count)]


def test_splitmix64_gives_the_published_stream_of_seed_0():
    states = np.array([0, 0x9E3779B97F4A7C15, (2 * 0x9E3779B97F4A7C15) & MASK], np.uint64)
    assert [hex(v) for v in splitmix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_the_order_is_a_sort_by_hash_in_plain_integers():
    for seed, epoch in ((0, 0), (42, 3), (2**40, 1)):
        salt = plain_splitmix64((plain_splitmix64(seed) + epoch) & MASK)
        expected = sorted(range(50), key=lambda i: plain_splitmix64(i ^ salt))
        assert DataOrder(50, 8, seed, True).epoch_order(epoch).tolist() == expected


def test_golden_order():
    """A change of algorithm must change ORDER_VERSION, or resumed runs would see rows twice or never."""
    order = DataOrder(10, 4, 42, True)
    assert [order.step_rows(step).tolist() for step in range(6)] == [
        [4, 3, 5, 8],
        [0, 9, 7, 6],
        [1, 2],
        [0, 9, 1, 8],
        [5, 7, 3, 4],
        [2, 6],
    ]


@pytest.mark.parametrize("shuffled", [True, False])
def test_each_epoch_takes_every_row_once(shuffled):
    order = DataOrder(37, 8, 5, shuffled)
    assert order.steps_per_epoch == 5
    for epoch in range(4):
        steps = [order.step_rows(epoch * 5 + i) for i in range(5)]
        assert [len(rows) for rows in steps] == [8, 8, 8, 8, 5]  # the last step is short, not filled up or dropped
        assert sorted(np.concatenate(steps).tolist()) == list(range(37))


def test_epochs_and_seeds_differ():
    orders = epochs(DataOrder(37, 8, 5, True), 5) + epochs(DataOrder(37, 8, 6, True), 5)
    assert len({tuple(order) for order in orders}) == 10
    # epoch 1 of seed 5 must not be epoch 0 of seed 6, nor a rotation: compare the places of neighbours
    for a in orders:
        for b in orders:
            if a is not b:
                assert sum(x == y for x, y in zip(a, b, strict=True)) < 9


def test_a_step_is_a_pure_function_of_its_number():
    order = DataOrder(37, 8, 5, True)
    forwards = [order.step_rows(step).tolist() for step in range(15)]
    backwards = [DataOrder(37, 8, 5, True).step_rows(step).tolist() for step in reversed(range(15))]
    assert forwards == backwards[::-1]


def test_an_epoch_is_sorted_once_and_its_order_cannot_be_changed(monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "lowlevel.batch.order.splitmix64", lambda values: hashed.append(len(values)) or splitmix64(values)
    )
    order = DataOrder(41, 8, 77, True)
    steps = [order.step_rows(step).tolist() for step in range(12)]  # two epochs of 6 steps
    assert hashed.count(41) == 2
    monkeypatch.undo()
    for epoch in (0, 1):
        salt = plain_splitmix64((plain_splitmix64(77) + epoch) & MASK)
        expected = sorted(range(41), key=lambda i: plain_splitmix64(i ^ salt))
        assert sum(steps[6 * epoch : 6 * epoch + 6], []) == expected
    with pytest.raises(ValueError, match="read-only"):
        order.step_rows(0)[0] = 1
    others = [DataOrder(41, 8, 78, True), DataOrder(40, 8, 77, True), DataOrder(41, 8, 77, False)]
    assert len({tuple(other.epoch_order(0).tolist()) for other in (order, *others)}) == 4


def test_the_order_does_not_depend_on_the_batch_size():
    whole = DataOrder(37, 37, 5, True).step_rows(0).tolist()
    assert np.concatenate([DataOrder(37, 8, 5, True).step_rows(step) for step in range(5)]).tolist() == whole


def test_sequential_is_the_order_of_the_rows():
    order = DataOrder(5, 2, 42, False)
    assert [order.step_rows(step).tolist() for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1e-12, 1), (1e-300, 1), (0.2, 1), (0.2 + 1e-6, 2), (1.0, 5), (0.1 + 0.2 + 0.7, 5), (3.0, 15)]
)
def test_a_part_of_an_epoch_is_whole_steps_and_at_least_one(epochs, steps):
    assert DataOrder(37, 8, 5, True).total_steps(TrainConfig(num_train_epochs=epochs)) == steps


def test_rows_are_spread_evenly():
    """Where row i lands must not depend on i: mean place of each row over many epochs within 5 sigma."""
    order, rows, count = DataOrder(16, 4, 1, True), 16, 600
    places = np.array([np.argsort(order.epoch_order(epoch)) for epoch in range(count)])
    sigma = np.sqrt((rows**2 - 1) / 12 / count)
    assert np.abs(places.mean(0) - (rows - 1) / 2).max() < 5 * sigma


@pytest.mark.parametrize("count", [4e8, 1e300, 1.7e308])
def test_epochs_that_would_never_end_are_refused_with_their_steps(count):
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    config = RunConfig(train=TrainConfig(num_train_epochs=count, **batch))
    with pytest.raises(ConfigError, match=r"train.num_train_epochs .* x 3 = .* steps; at most 1,000,000,000"):
        DataOrder.of(config, range(12))
    limited = RunConfig(train=TrainConfig(num_train_epochs=count, max_steps=7, **batch))
    assert DataOrder.of(limited, range(12)).total_steps(limited.train) == 7


def test_the_rows_of_a_pair_stay_together_and_others_where_they_were():
    """The second row of a pair has the first one's key in the sort; rows of their own have the keys of any run."""
    places = [
        "a b:1",
        "a b:2 chosen",
        "a b:2 rejected",
        "a b:3 rejected",
        "a b:4",
        "a b:5 chosen",
        "a b:6",
        "a b:5 rejected",
    ]
    together = [0, 1, 1, 3, 4, 5, 6, 5]
    examples = [SimpleNamespace(where=place) for place in places]
    config = RunConfig(method="kto", train=TrainConfig(data_order="shuffled_pairs", seed=3))
    for epoch in range(4):
        plain = DataOrder(8, 8, 3, True).epoch_order(epoch).tolist()
        expected = sorted(range(8), key=lambda i: (plain.index(together[i]), i))
        assert DataOrder.of(config, examples).epoch_order(epoch).tolist() == expected
    alone = [one for one in examples if one.where[-1].isdigit()]
    same = DataOrder.of(config, alone).epoch_order(0).tolist()
    assert same == DataOrder(len(alone), 8, 3, True).epoch_order(0).tolist()
