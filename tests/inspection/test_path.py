"""The path from log-probabilities to the loss, in words and numbers, for every kind of loss."""

import math

import helpers
import pytest
from samples import pairs

from lowlevel.inspection.pairs import inspect_pairs
from lowlevel.inspection.reading import formula, settings
from lowlevel.losses import LOSSES


def path_of(policy, **config):
    example = inspect_pairs(policy, helpers.dpo(**config), pairs())[2]
    return example, {name: example.values(name) for name in example.equation}


def test_the_path_of_dpo(policy):
    example, steps = path_of(policy, beta=0.2)
    assert list(steps) == ["tokens", "policy", "reference", "log-ratio", "reward", "margin", "weight", "loss"]
    ratios = [p - r for p, r in zip(steps["policy"], steps["reference"], strict=True)]
    assert steps["log-ratio"] == pytest.approx(ratios, abs=1e-5)
    assert steps["reward"] == pytest.approx([0.2 * ratio for ratio in ratios], abs=1e-5)
    (margin,) = steps["margin"]
    assert margin == pytest.approx(0.2 * (ratios[0] - ratios[1]), abs=1e-5)
    assert (example.equation["weight"], example.equation["loss"]) == ("σ(−x)", "−log σ(x)")
    assert steps["weight"] == [pytest.approx(1 / (1 + math.exp(margin)), abs=1e-6)]
    assert steps["loss"] == [pytest.approx(math.log1p(math.exp(-margin)), abs=1e-6)]


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_a_loss_of_averages_shows_them(policy, name):
    example, steps = path_of(policy, loss_type=name, beta=0.2)
    n = [len(text.scored) for text in example.texts]
    averages = [reward / size for reward, size in zip(steps["reward"], n, strict=True)]
    assert steps["tokens"] == n and steps["reward per token"] == pytest.approx(averages, abs=1e-6)
    (averaged,) = steps["averaged margin"]
    assert averaged == pytest.approx(averages[0] - averages[1], abs=1e-5)
    assert averaged == pytest.approx(float(example.running("adds")[-1]), abs=1e-5)
    assert len(steps["weight"]) == 1 and example.equation["weight"] == "−dL/d(averaged margin)"
    expected = {"ipo": (averaged / 0.2 - 2.5) ** 2}.get(name)
    assert expected is None or steps["loss"] == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize("name", ["bco_pair", "dpop", "rpo", "aot"])
def test_a_loss_that_reads_both_has_two_weights(policy, name):
    example, steps = path_of(policy, loss_type=name)
    assert len(steps["weight"]) == 2 and "weight" not in example.numbers
    assert ("quantile" in example.equation["loss"]) == (name == "aot")


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
