"""A run that takes long on a CPU says so once, with the measured seconds a step and what would be faster."""

from dataclasses import replace
from types import SimpleNamespace

import helpers
import pytest
import torch

from lowlevel.config.schema import RunConfig
from lowlevel.model.placement import Placement
from lowlevel.model.policy import dequantize_once
from lowlevel.running.pace import Pace, faster


@pytest.fixture(scope="module")
def policy(tiny_base):
    return helpers.make_policy(tiny_base, quantised=True)


def state(step: int, seconds: float):
    return SimpleNamespace(step=step, seconds=seconds)


def test_after_20_s_of_its_own_steps_and_once(policy):
    pace = Pace(RunConfig(), policy, total_steps=100, first=10, seconds=500.0)
    assert pace.forecast(state(11, 512)) is None, "12 s are too few"
    line = pace.forecast(state(12, 524))
    assert line.startswith("slow: 12.0 s a step on this CPU, about 18 min for the 88 steps left; faster: train.dequant")
    assert "max_length (now 512)" in line and line.endswith(", or a GPU")
    assert pace.forecast(state(13, 536)) is None


@pytest.mark.parametrize(("device", "steps"), [("cpu", 50), ("cuda", 1000)])
def test_not_for_a_short_rest_or_on_a_gpu(policy, device, steps):
    """2 steps of 12 s; 48 more take 9.6 min."""
    there = replace(policy, placement=Placement(torch.device(device), "fp32"))
    assert Pace(RunConfig(), there, steps, first=0, seconds=0.0).forecast(state(2, 24.0)) is None


def test_dequantised_weights_are_not_advised_twice(policy):
    assert "model.load_in_4bit = false" in faster(RunConfig(), policy)[0]
    dequantize_once(policy)
    assert not any("4bit" in text for text in faster(RunConfig(), policy))
