"""Quantiles, rates and shares, worked out by hand."""

import pytest
from helpers import step_result

from lowlevel.errors import ConfigError
from lowlevel.timing import phases
from lowlevel.timing.phases import OTHER
from lowlevel.timing.steps import Step, mean_phases, whole


def step(seconds=1.0, *, tokens=60, supervised=20, positions=80, set_up=False, repeated=False, **parts) -> Step:
    result = step_result({"loss": 1.0}, supervised, tokens=tokens, supervised=supervised, positions=positions)
    return Step(1, parts or {OTHER: seconds}, result, set_up, repeated)


def test_whole_steps():
    times = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]
    found = whole([step(one) for one in reversed(times)])
    assert found.counted == 11
    assert (found.p10_ms, found.median_ms, found.p90_ms) == pytest.approx((200, 600, 1000))
    assert found.tokens_per_second == pytest.approx(11 * 60 / 6.6)  # all tokens over all seconds, not a mean of rates
    assert found.supervised_tokens_per_second == pytest.approx(11 * 20 / 6.6)
    assert found.padding_share == pytest.approx(0.25)
    assert (found.set_up.count, found.set_up.median_ms) == (found.repeated.count, found.repeated.median_ms) == (0, None)


def test_steps_of_other_sizes_weigh_by_their_size():
    found = whole([step(1.0, tokens=100, supervised=10, positions=100), step(3.0, tokens=20, supervised=2)])
    assert found.tokens_per_second == 30 and found.supervised_tokens_per_second == 3
    assert found.padding_share == pytest.approx(1 - 120 / 180)


def test_what_does_not_count_is_told_apart():
    slow = [step(9.0, set_up=True), step(5.0, set_up=True, repeated=True), step(2.0, repeated=True)]
    found = whole([step(0.1), *slow, step(0.1)])
    assert found.counted == 2 and found.median_ms == found.p90_ms == pytest.approx(100)
    assert (found.set_up.count, found.set_up.median_ms) == (2, pytest.approx(7000))
    assert (found.repeated.count, found.repeated.median_ms) == (1, pytest.approx(2000))


def test_nothing_to_count_is_an_error():
    for summary in (whole, mean_phases):
        with pytest.raises(ConfigError, match="--steps 2: each of these steps"):
            summary([step(set_up=True), step(repeated=True)])


def test_phases_are_means_that_add_up():
    steps = [
        step(**{phases.BACKWARD: 0.3, phases.FORWARD: 0.1, OTHER: 0.1}),
        step(**{phases.BACKWARD: 0.5, phases.COPY: 0.2, OTHER: 0.1}),
        step(**{phases.OPTIMIZER: 9.0}, set_up=True),
    ]
    found = mean_phases(steps)
    assert list(found) == [phases.COPY, phases.FORWARD, phases.BACKWARD, OTHER]  # as a step goes
    assert found == pytest.approx({phases.COPY: 100, phases.FORWARD: 50, phases.BACKWARD: 400, OTHER: 100})
    assert sum(found.values()) == pytest.approx(1e3 * (steps[0].seconds + steps[1].seconds) / 2)
