"""The path from log-probabilities to the loss, in words and numbers, for every kind of loss."""

import helpers
import pytest
from samples import pairs

from lowlevel.inspection.lines import loss_path
from lowlevel.inspection.reading import formula, settings
from lowlevel.inspection.records import inspect_pairs
from lowlevel.losses import LOSSES


def path_of(policy, **config):
    method = helpers.dpo(**config)
    record = inspect_pairs(policy, method, pairs())[2]
    return record, {step.name: step for step in loss_path(record, method)}


def test_the_path_of_dpo(policy):
    record, steps = path_of(policy, beta=0.2)
    assert list(steps) == ["policy", "reference", "log-ratio a, b", "reward", "margin x", "weight", "loss L"]
    a = steps["policy"].chosen - steps["reference"].chosen
    b = steps["policy"].rejected - steps["reference"].rejected
    assert (steps["log-ratio a, b"].chosen, steps["log-ratio a, b"].rejected) == pytest.approx((a, b), abs=1e-5)
    assert (steps["reward"].chosen, steps["reward"].rejected) == pytest.approx((0.2 * a, 0.2 * b), abs=1e-5)
    assert steps["margin x"].pair == pytest.approx(0.2 * (a - b), abs=1e-5)
    assert (steps["weight"].formula, steps["loss L"].formula) == ("σ(−x)", "−log σ(x)")
    assert steps["weight"].pair == pytest.approx(float((-record.margin).sigmoid()), abs=1e-6)
    assert steps["loss L"].pair == float(record.loss)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_a_loss_of_averages_shows_them(policy, name):
    record, steps = path_of(policy, loss_type=name, beta=0.2)
    plus, minus = len(record.chosen.tokens), len(record.rejected.tokens)
    assert f"n₊ = {plus}, n₋ = {minus}" in steps["reward per token"].formula
    averaged = steps["reward"].chosen / plus - steps["reward"].rejected / minus
    assert steps["averaged margin"].pair == pytest.approx(averaged, abs=1e-5)
    assert steps["averaged margin"].pair == pytest.approx(float(record.running_sums[-1]), abs=1e-5)
    assert steps["weight"].pair is not None
    expected = {"ipo": (averaged / 0.2 - 2.5) ** 2}.get(name)
    assert expected is None or steps["loss L"].pair == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["bco_pair", "dpop", "rpo", "aot"])
def test_a_loss_that_reads_both_has_two_weights(policy, name):
    record, steps = path_of(policy, loss_type=name)
    assert (steps["weight"].chosen, steps["weight"].rejected) == (
        float(record.chosen.weight),
        float(record.rejected.weight),
    )
    assert steps["weight"].pair is None
    assert ("quantile" in steps["loss L"].formula) == (name == "aot")


def test_formulas_keep_their_words():
    assert formula(LOSSES["ipo"]) == "(a/n₊ − b/n₋ − 1/(2 β))²"
    assert formula(LOSSES["robust"]) == "(−(1−ε) log σ(x) + ε log σ(−x)) / (1−2 ε)"
    assert formula(LOSSES["rpo"]) == "−log σ(x) − α log π(y₊) / n₊"
    for name in LOSSES:
        left = formula(LOSSES[name]).replace("cdpo on sort", "").replace("sort", "").replace("log", "")
        assert not any(word in left for word in ("beta", "eps", "ls(", "pi(", "lambda", "tau", "alpha", "^"))


def test_settings_name_what_the_loss_reads():
    assert settings(helpers.dpo()) == "sigmoid, β 0.1"
    assert settings(helpers.dpo(loss_type="cdpo", label_smoothing=0.1, beta=0.5)) == "cdpo, β 0.5, ε 0.1"
    assert settings(helpers.dpo(loss_type="dpop", dpop_lambda=5.0)) == "dpop, β 0.1, λ 5"
