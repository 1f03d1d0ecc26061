"""The built-in token losses are verified in float64 and by central differences, and their faults are found."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_evidence import test_the_losss_error_is_that_of_random_errors as random_errors

import lowlevel.methods.sft
from lowlevel.verification.report import run_checks

SETTINGS = {
    "smoothed": {"loss_type": "smoothed_cross_entropy"},
    "smoothed with z-loss": {"loss_type": "smoothed_cross_entropy", "label_smoothing": 0.3, "z_loss_weight": 0.01},
    "dft": {"loss_type": "dft"},
    "dft with z-loss": {"loss_type": "dft", "z_loss_weight": 0.01},
    "z-loss": {"z_loss_weight": 0.01},
}


@pytest.fixture
def subject(make, request):
    return make("sft", sft=SETTINGS[request.param])


@pytest.mark.parametrize("subject", [name for name in SETTINGS if "z-loss" in name], indirect=True)
def test_every_check_holds(subject):
    checks = run_checks(subject)
    assert not [check for check in checks if not check.ok]
    names = {check.name for check in checks}
    detaches = subject.config.sft.loss_type == "dft"
    assert {"loss, central differences" in names, "step, central differences" in names} == {not detaches}
    assert ("z_loss_weight reaches the loss" in names) == (subject.config.sft.z_loss_weight > 0)
    assert ("label_smoothing reaches the loss" in names) == ("smooth" in subject.config.sft.loss_type)


@pytest.mark.parametrize("subject", ["smoothed with z-loss", "dft"], indirect=True)
def test_errors_of_tokens_move_the_value_of_a_loss_with_detached_parts(subject, request, monkeypatch):
    monkeypatch.setattr(request, "getfixturevalue", lambda name: subject)
    random_errors("sft", request)


def test_weights_that_do_not_reach_the_divisor_are_found(sft, monkeypatch):
    weights = [np.linspace(0.5, 2, len(x.input_ids)).astype(np.float32) for x in sft.examples]
    examples = tuple(replace(x, weights=w) for x, w in zip(sft.examples, weights, strict=True))
    assert all(check.ok for check in run_checks(replace(sft, examples=examples)))
    monkeypatch.setattr(lowlevel.methods.sft.SFT, "count", lambda self, batch: batch.num_scored)
    failed = {check.name for check in run_checks(replace(sft, examples=examples)) if not check.ok}
    assert failed == {"step loss", "counts of the step", "step, float64 autograd", "step, central differences"}


def without_target(tokens, *, label_smoothing=0.1):
    """Smoothing over the other V - 1 tokens, as some define it."""
    size = 500
    others = (size * tokens.statistics["mean_logp"] - tokens.token_logps) / (size - 1)
    return -(1 - label_smoothing) * tokens.token_logps - label_smoothing * others


def attached(tokens):
    return -tokens.token_logps.exp() * tokens.token_logps


@pytest.mark.parametrize(
    ("subject", "function", "found"),
    [
        ("smoothed", without_target, "loss: summed loss of an example"),
        ("dft", attached, "gradients: loss in the log-probabilities"),
    ],
    indirect=["subject"],
)
def test_another_formula_is_found(subject, function, found, monkeypatch):
    plain = lowlevel.methods.sft.sft_loss

    def other(config):
        loss = plain(config)
        return replace(loss, spec=replace(loss.spec, function=function))

    monkeypatch.setattr(lowlevel.methods.sft, "sft_loss", other)
    failed = {f"{check.group}: {check.name}" for check in run_checks(replace(subject, method=replace(subject.method)))
              if not check.ok}  # fmt: skip
    assert found in failed


@pytest.mark.parametrize("subject", ["smoothed with z-loss"], indirect=True)
def test_a_statistic_that_is_wrong_is_found(subject, monkeypatch):
    plain = lowlevel.methods.sft.Policy.token_scores

    def off(policy, batch, needs):
        logps, statistics = plain(policy, batch, needs)
        return logps, statistics | {"lse": statistics["lse"] + torch.tensor(1e-3)}

    monkeypatch.setattr(lowlevel.methods.sft.Policy, "token_scores", off)
    assert "loss: summed loss of an example" in {f"{c.group}: {c.name}" for c in run_checks(subject) if not c.ok}
