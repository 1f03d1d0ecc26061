"""The step: taken as runs take it, and what two modes of it may differ by."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import step_result

from lowlevel.config.schema import RunConfig
from lowlevel.execution import WithFallback, micro_step
from lowlevel.preflight.numerics import Taken, demo_config, judge, one_step
from lowlevel.running.observer import MARGINS
from lowlevel.verification.subject import Subject

GRADIENT = torch.tensor([3.0, 4.0, 0.0])


def taken(mode="eager", loss=2.0, norm=5.0, gradient=GRADIENT, margin=None, accuracy=0.5) -> Taken:
    metrics = {"loss": loss} | ({} if margin is None else {MARGINS: margin, "rewards/accuracies": accuracy})
    return Taken(mode, step_result(metrics, 8, grad_norm=norm), gradient)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_step_of_the_built_in_base(method):
    answer = one_step(method)
    assert answer.verdict == "ok", answer
    assert answer.found.startswith("fp32; eager: loss ") and "0.0e+00 apart (bound 1e-05)" in answer.found
    assert ("all 8 margins are 0" in answer.found) == (method == "dpo")
    assert (f"loss {math.log(2):.4f}" in answer.found) == (method == "dpo")


def test_the_configuration_is_that_of_a_run():
    config = demo_config("dpo")
    assert isinstance(config, RunConfig) and config.method == "dpo"
    assert config.model.name == config.data.source == "demo"
    assert config.lora.lora_dropout > 0 and config.rows_per_step == 8


class Scaled:
    """An execution whose gradient is off by a factor."""

    mode = "graphed"

    def __init__(self, subject: Subject, factor: float) -> None:
        self.policy, self.method, self.factor, self.calls = subject.policy, subject.method, factor, 0

    def run(self, batch, factor, dropout_key):
        self.calls += 1
        return micro_step(self.policy, self.method, batch, factor * self.factor, dropout_key)


def test_a_mode_that_computes_something_else_is_found(monkeypatch):
    made = []
    monkeypatch.setattr(Subject, "execution", lambda self, note: made.append(Scaled(self, 1.001)) or made[0])
    answer = one_step("sft")
    assert answer.verdict == "FAIL" and "graphed: loss" in answer.found
    assert made[0].calls == 3 * 3  # three micro-batches, three times: set up, captured, replayed


def test_a_mode_that_falls_back_is_a_note(monkeypatch):
    def fallen(subject, note):
        note.append("execution: graphed failed (no compiler); continuing eager")
        return WithFallback(subject.policy, subject.method, "eager", note.append)

    monkeypatch.setattr(Subject, "execution", fallen)
    answer = one_step("sft")
    assert answer.verdict == "note" and "continuing eager" in answer.found


# What is judged


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_within_the_bounds(precision):
    bound = {"fp16": 2e-3, "fp32": 1e-5}[precision]
    own = taken("graphed", loss=2 * (1 + 0.9 * bound), norm=5 * (1 - 0.9 * bound))
    answer = judge(precision, taken(), own, [])
    assert answer.verdict == "ok" and f"{0.9 * bound:.1e} apart (bound {bound:g})" in answer.found


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("key", ["loss", "norm", "nan", "infinite", "turned"])
def test_beyond_them(precision, key):
    over = 1 + 1.1 * {"fp16": 2e-3, "fp32": 1e-5}[precision]
    own = {
        "loss": taken("graphed", loss=2 * over),
        "norm": taken("graphed", norm=5 / over**2),
        "nan": taken("graphed", loss=math.nan),
        "infinite": taken("graphed", norm=math.inf),
        "turned": taken("graphed", gradient=torch.tensor([4.0, 3.0, 0.0])),  # as long, elsewhere
    }[key]
    assert judge(precision, taken(), own, []).verdict == "FAIL"


def test_margins_must_be_zero_in_both_modes():
    still = taken(margin=0.0)
    answer = judge("fp16", still, taken("graphed", margin=0.0), [])
    assert answer.verdict == "ok" and "all 8 margins are 0" in answer.found
    for moved in (taken("graphed", margin=1e-9), taken("graphed", margin=0.0, accuracy=0.625)):
        assert judge("fp16", still, moved, []).verdict == "FAIL"
        assert judge("fp16", replace(moved, mode="eager"), still, []).verdict == "FAIL"
