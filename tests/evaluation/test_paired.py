"""The bootstrap against the standard errors and intervals that the normal approximation gives, and by hand."""

import math

import numpy as np
import pytest

from lowlevel.errors import LowlevelError
from lowlevel.evaluation.paired import paired_difference, weighted_difference
from lowlevel.evaluation.results import check_prompts


def answers(items: int, seed: int, share: float) -> np.ndarray:
    return (np.random.default_rng(seed).random(items) < share).astype(float)


def test_mean_has_the_paired_standard_error():
    before = answers(400, 1, 0.5)
    after = np.where(answers(400, 2, 0.1) > 0, 1.0, before)  # right where it was right, and at some more items
    one = paired_difference(before, after, "task").as_json()
    changes = after - before
    expected = changes.std(ddof=1) / math.sqrt(400)
    assert one["value"] == pytest.approx(changes.mean(), abs=1e-12)
    assert one["stderr"] == pytest.approx(expected, rel=0.03)
    assert one["low"] == pytest.approx(changes.mean() - 1.96 * expected, abs=0.1 * expected + 1 / 400)
    assert one["high"] == pytest.approx(changes.mean() + 1.96 * expected, abs=0.1 * expected + 1 / 400)
    apart = math.sqrt(before.var(ddof=1) / 400 + after.var(ddof=1) / 400)
    assert one["stderr"] < 0.5 * apart  # the point of pairing
    assert paired_difference(before, after, "task").as_json() == one


def test_other_aggregates_are_resampled_together():
    rng = np.random.default_rng(0)
    words = rng.integers(5, 50, 60)
    first = [(-2.0 * w + float(rng.normal()), int(w)) for w in words]  # (log-likelihood, words), as lm-eval has them
    second = [(logp + 0.1 * w, w) for logp, w in first]

    def perplexity(items):
        return math.exp(-sum(logp for logp, _ in items) / sum(w for _, w in items))

    def logarithm(items):
        return math.log(perplexity(items))

    change = paired_difference(first, second, "task", logarithm).as_json()
    assert change["value"] == pytest.approx(-0.1)
    assert change["stderr"] < 1e-12  # each item changes by the same amount: what it is drawn with does not matter
    assert paired_difference(first, second, "task", perplexity).as_json()["stderr"] > 1e-3


def test_groups_add_independent_tasks():
    parts = [paired_difference(answers(n, n, 0.4), answers(n, n + 1, 0.6), str(n)) for n in (100, 300)]
    both = weighted_difference(parts, [100, 300]).as_json()
    assert both["value"] == pytest.approx(0.25 * parts[0].value + 0.75 * parts[1].value)
    errors = [part.as_json()["stderr"] for part in parts]
    assert both["stderr"] == pytest.approx(math.hypot(0.25 * errors[0], 0.75 * errors[1]), rel=0.03)


def test_one_item_has_no_interval():
    one = paired_difference([0.0], [1.0], "task")
    assert one.as_json() == {"value": 1.0, "stderr": None, "low": None, "high": None}
    assert weighted_difference([one, paired_difference([0, 1], [1, 1], "two")], [1, 1]).as_json()["low"] is None


def test_stages_must_get_the_same_prompts():
    def result(prompt):
        return {"samples": {"t": [{"doc_id": 0, "filter": "none", "prompt_hash": prompt, "target_hash": "x"}]}}

    check_prompts({"base": result("a"), "sft": result("a")})
    with pytest.raises(LowlevelError, match="task t has other prompts for sft"):
        check_prompts({"base": result("a"), "sft": result("b")})
